"""Text as people have it: published data sets, other encodings, other formats, files of any size."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmquant.calibration.text.chat import load_template
from mmquant.calibration.text.corpus import bundled, pack_windows, read_sets
from mmquant.calibration.text.overlap import overlap, shingles
from mmquant.calibration.text.rows import Chat, parse_row
from mmquant.calibration.text.sample import make_sample, read_texts
from mmquant.calibration.text.tokenizer import load_tokenizer
from mmquant.calibration.text.tokens import can_cut, pieces, tokens_of
from mmquant.convert.open import open_source
from mmquant.errors import InputError

SOURCE = open_source("demo")
TOKENIZER, TEMPLATE = load_tokenizer(SOURCE), load_template(SOURCE)
USER, ANSWER = "What is a river?", "Water on its way. " * 40
MESSAGES = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
CALL = {"name": "look", "arguments": {"city": "Chengdu"}}


def texts(path: Path) -> list[str]:
    return [document.text for part in read_sets([str(path)], TEMPLATE) for document in part.documents]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"messages": MESSAGES, "text": None, "tools": None, "system": ""},
        {"messages": [{**m, "tool_calls": None, "reasoning_content": "", "name": None} for m in MESSAGES], "tools": []},
        {"messages": [], "conversations": MESSAGES},
        {"conversations": [{"from": "human", "value": USER}, {"from": "gpt", "value": ANSWER}]},
        {"conversation": [{"role": "human", "content": USER}, {"role": "model", "content": ANSWER}]},
        {"instruction": USER, "input": "", "output": ANSWER},
        {"instruction": USER, "input": None, "output": ANSWER, "history": []},
        {"prompt": USER, "completion": ANSWER},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"prompt": USER, "chosen": ANSWER, "rejected": "no"},
        {"chosen": MESSAGES, "rejected": MESSAGES[:1], "prompt": USER},
        {"prompt": "a heading", "prompt_id": "7", "messages": MESSAGES},
        {"question": USER, "answer": ANSWER},
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]},
    ],
)
def test_every_form_of_a_chat_is_the_same_chat(row: dict[str, Any]) -> None:
    found = parse_row(row)
    assert isinstance(found, Chat)
    assert TEMPLATE is not None
    assert found.tools == ()
    assert TEMPLATE.render(found) == TEMPLATE.render(Chat(tuple(MESSAGES), ()))


def test_systems_inputs_histories_thoughts_and_calls_are_kept() -> None:
    alpaca = {"system": "Be brief.", "instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]]}
    found = parse_row(alpaca)
    assert isinstance(found, Chat)
    assert [(m["role"], m["content"]) for m in found.messages] == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add.\n\n1 2"),
        ("assistant", "3"),
    ]
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": json.dumps(CALL)}]
    turns += [{"from": "observation", "value": "rain"}, {"from": "gpt", "value": "Rain.", "thinking": "so"}]
    found = parse_row({"conversations": turns, "tools": json.dumps([{"name": "look"}])})
    assert isinstance(found, Chat)
    assert [m["role"] for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"][0]["function"] == CALL
    assert found.messages[3]["reasoning_content"] == "so"
    assert found.tools == ({"name": "look"},)
    assert parse_row({"text": "plain", "meta": {}}) == parse_row("plain") == "plain"
    assert parse_row({"text": ""}) == ""


def test_a_null_thought_is_none_that_is_rendered() -> None:
    found = parse_row({"messages": [{"role": "assistant", "content": "x", "reasoning_content": None}]})
    assert isinstance(found, Chat)
    assert TEMPLATE is not None
    assert "None" not in TEMPLATE.render(found)
    assert "<think>" not in TEMPLATE.render(found)


ROWS = [{"messages": MESSAGES}, {"text": "grüße 你好 \U0001f600 " * 30}, {"prompt": USER, "completion": ANSWER}]
LINES = "\n".join(json.dumps(row) for row in ROWS)
FORMS = {
    "a.jsonl": LINES.encode(),
    "b.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "c.jsonl": LINES.replace("\n", "\r\n\r\n").encode() + b"\r\n",
    "d.json": json.dumps(ROWS).encode(),
    "e.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "f.json": LINES.encode(),
    "g.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "h.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "i.txt": LINES.encode(),
    "j.txt": json.dumps(ROWS).encode(),
    "k.raw": json.dumps(ROWS, indent=4).encode(),
    "l.jsonl": json.dumps(ROWS).encode(),
    "m.ndjson": LINES.encode(),
    "n": LINES.encode(),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_data_set_is_its_rows_in_whatever_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    (tmp_path / "plain.jsonl").write_text(LINES)
    assert texts(tmp_path / name) == texts(tmp_path / "plain.jsonl")
    (scored,) = read_texts([tmp_path / name], TEMPLATE)
    assert ["".join(parts) for parts in scored.parts()] == texts(tmp_path / name)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=40).filter(str.strip), min_size=1, max_size=6), st.integers(0, 3), st.booleans())
def test_rows_of_a_list_are_found_at_any_size(
    tmp_path_factory: pytest.TempPathFactory, found: list[str], indent: int, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("rows") / "x.json"
    rows = [{"text": text * 9} for text in found] + [{"text": "long " * 70_000}]
    path.write_text(json.dumps(rows, indent=indent or None, ensure_ascii=ascii_only), "utf-8", newline="")
    assert texts(path) == [row["text"] for row in rows]


def test_json_that_is_no_data_set_stays_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"name": "x"}\n{"name": "y"}\n')
    (tmp_path / "b.txt").write_text("[1] See the first note.\n")
    assert texts(tmp_path / "a.txt") == ['{"name": "x"}\n{"name": "y"}\n']
    assert texts(tmp_path / "b.txt") == ["[1] See the first note.\n"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.json", b'[{"foo": 1}]', "row 1: keys 'foo': no known form, expected text | messages [role, content]"),
        ("a.json", b'{"foo": [{"text": "x"}]}', "line 1: keys 'foo': no known form"),
        ("a.json", b'[{"text": "x"}, {"text": 3}]', "row 2: keys 'text'"),
        ("a.json", b'[{"text": "x"}, {"te', "row 2: not JSON"),
        ("a.json", b'[{"text": "x"},', "the list does not end, the file is cut off"),
        ("a.json", b'[{"text": "x"}, {]}' + b" " * 9999, "row 2: not JSON"),
        ("a.json", b"", "empty, expected text"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: byte 10 is not UTF-8"),
        ("a.jsonl", LINES.encode("utf-16"), "UTF-16, expected UTF-8 text or JSONL (iconv -f UTF-16"),
        ("a.txt", "plain words".encode("utf-16-le"), "UTF-16, expected UTF-8"),
        ("a.txt", "plain words".encode("utf-16-be"), "UTF-16, expected UTF-8"),
        ("a.txt", "plain words".encode("utf-32"), "UTF-32, expected UTF-8"),
        ("a.txt", b"words\0and a zero", "byte 5 is NUL: binary"),
        ("a.jsonl.gz", gzip.compress(LINES.encode()), "gzip, expected UTF-8 text or JSONL (gunzip unpacks it)"),
        ("a.parquet", b"PAR1" + bytes(40) + b"PAR1", "Parquet, expected UTF-8 text or JSONL (the datasets library"),
        ("a.txt", b"\x28\xb5\x2f\xfd" + bytes(9), "Zstandard, expected"),
        ("a.csv", b"a,b\n1,2\n", "a table, expected text"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a git-lfs pointer"),
    ],
)
def test_what_cannot_be_read_is_one_line_for_calibration_and_evaluation(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    for read in (lambda: texts(path), lambda: make_sample(read_texts([path], TEMPLATE), TOKENIZER, 8)):
        with pytest.raises(InputError, match=re.escape(reason) if data else "empty|0 tokens") as caught:
            read()
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


def test_a_folder_with_data_in_other_forms_is_not_read_around(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("what this data set is " * 9)
    (tmp_path / "LICENSE").write_text("none")
    notes: list[str] = []
    assert len(read_sets([str(tmp_path)], TEMPLATE, notes)) == 1
    assert "1 files are not read (LICENSE)" in notes[0]
    for name in ("train.parquet", "train.jsonl.gz", "train.csv"):
        (tmp_path / name).write_bytes(b"PAR1")
        for read in (lambda: texts(tmp_path), lambda: read_texts([tmp_path], TEMPLATE)):
            with pytest.raises(InputError, match=f"{name}: not text"):
                read()
        (tmp_path / name).unlink()


def test_half_a_character_becomes_the_replacement_and_is_said(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    chat = {"messages": [{"role": "user", "content": "cut \ud83d"}]}
    path.write_text('{"text": "whole \\ud83d\\ude00"}\n' + json.dumps(chat) + '\n{"text": "\\udc00 and \\ud83d"}\n')
    notes: list[str] = []
    (part,) = read_sets([str(path)], TEMPLATE, notes)
    found = [document.text for document in part.documents]
    assert found[0] == "whole \U0001f600"
    assert "cut \ufffd" in found[1]
    assert found[2] == "\ufffd and \ufffd"
    assert notes == [f"{path}: line 2: a lone surrogate (half of a character) became U+FFFD, 3 in the file"]
    assert len(pack_windows([part], TOKENIZER, 4).seen) == 0
    make_sample(read_texts([path], TEMPLATE), TOKENIZER, 4)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


WORDS = st.sampled_from(
    ["a", "B", " ", "\n", "\t", "  ", "'s", "。", "，", "中", "文", "1", "/", "é", "e\u0301", "]~b]", "."]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, max_size=60).map("".join), st.integers(1, 20))
@example("a  \n\n b. /c", 1)
def test_pieces_have_the_tokens_of_the_whole(text: str, size: int) -> None:
    cut = list(pieces([text[:7], text[7:9], text[9:]], size))
    assert "".join(cut) == text
    assert [token for piece in cut for token in ids(piece)] == ids(text)


def test_the_bundled_texts_have_the_tokens_of_the_whole() -> None:
    assert can_cut(TOKENIZER)
    for path in sorted(bundled("calibration").rglob("*.txt")):
        text = path.read_text("utf-8")
        for size in (100, 1 << 15):
            cut = list(pieces([text], size))
            assert len(cut) > 1 or len(text) <= size
            assert [token for piece in cut for token in ids(piece)] == ids(text)


def test_a_tokenizer_that_marks_the_start_gets_each_text_whole() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "b": 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert not can_cut(tokenizer)
    assert len(list(tokens_of(tokenizer, [["a b " * 9, "a"] * 9000]))) == 1


def test_a_text_without_any_place_to_cut_is_cut_all_the_same() -> None:
    assert [len(piece) for piece in pieces(["x" * 90], 10, longest=40)] == [40, 40, 10]


def test_overlap_is_the_same_in_parts() -> None:
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in rng.integers(0, 300, 3000)]
    known = np.sort(shingles(" ".join(words[500:900])))
    text = " ".join(words)
    whole = overlap(text, known)
    assert whole.longest == 400
    for step in (7, 100, 1000):
        parts = [text[i : i + step] for i in range(0, len(text), step)]
        assert overlap(parts, known) == whole


def big(path: Path, megabytes: int) -> Path:
    """Prose without a line break, as a text or as JSONL."""
    words = (bundled("evaluation") / "prose.txt").read_text("utf-8")[:60_000].replace("\n", " ") + " "
    line = words if path.suffix == ".txt" else json.dumps({"text": words[:1000]}) + "\n"
    path.write_text(line * (megabytes * 1_000_000 // len(line)))
    return path


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_memory_follows_what_is_used_not_the_file(tmp_path: Path, name: str) -> None:
    """Python's own allocations: the text, its rows and its tokens (the tokenizer's are those of one batch)."""
    peaks = []
    for megabytes in (1, 6):
        path = big(tmp_path / name, megabytes)
        tracemalloc.start()
        corpus = pack_windows(read_sets([str(path)]), TOKENIZER, 128, 2)
        sample = make_sample(read_texts([path]), TOKENIZER, 128, 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert corpus.tokens.shape == sample.tokens.shape == (2, 128)
        assert len(corpus.seen) < 50_000
    assert peaks[1] < peaks[0] + 1_500_000


def test_shares_of_long_sets_are_estimated_from_their_beginnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {}
    for name, times in (("a", 40), ("b", 10)):
        (tmp_path / f"{name}.txt").write_text(f"the same words in file {name}, again and again. " * times * 100)
        sizes[name] = times
    sets = read_sets([str(tmp_path)])
    exact = pack_windows(sets, TOKENIZER, 32, 50)
    monkeypatch.setattr("mmquant.calibration.text.corpus.COUNTED", 10_000)
    rough = pack_windows(sets, TOKENIZER, 32, 50)
    assert rough.fingerprint == pack_windows(sets, TOKENIZER, 32, 50).fingerprint
    windows = exact.describe()["windows_by_domain"]
    assert windows == {"a": 40, "b": 10}
    assert all(abs(count - windows[name]) <= 1 for name, count in rough.describe()["windows_by_domain"].items())
