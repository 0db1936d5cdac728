"""Corpora: reading, mixing, packing, refusals."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmquant.calibration.text.chat import ChatTemplate, load_template
from mmquant.calibration.text.corpus import EMPHASIS, TextSet, bundled, pack_windows, read_sets, shares
from mmquant.calibration.text.documents import Document
from mmquant.calibration.text.overlap import PASSAGE, check_disjoint, overlap, shingles
from mmquant.calibration.text.rows import Chat, parse_line
from mmquant.calibration.text.tokenizer import load_tokenizer
from mmquant.convert.open import open_source

# As in M2's release: thinking and tool calls are rendered by the template, tools in the system message.
M2_STYLE = """{{- ']~!b[' ~ ']~b]system\n' -}}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}
{%- if tools %}{{ '\n<tools>\n' }}{% for tool in tools %}<tool>{{ tool.function | tojson(ensure_ascii=False) }}</tool>
{% endfor %}</tools>{% endif -%}{{- '[e~[\n' -}}
{%- for message in messages if message.role != 'system' -%}
{{- ']~b]' ~ ('ai' if message.role == 'assistant' else message.role) ~ '\n' -}}
{%- if message.reasoning_content %}{{ '<think>\n' ~ message.reasoning_content ~ '\n</think>\n\n' }}{% endif -%}
{{- message.content -}}
{%- if message.tool_calls %}{{ '\n<minimax:tool_call>\n' }}{% for call in message.tool_calls -%}
<invoke name="{{ call.function.name }}">
{% for k, v in call.function.arguments.items() -%}
<parameter name="{{ k }}">{{ v if v is string else v | tojson }}</parameter>
{% endfor %}</invoke>
{% endfor %}</minimax:tool_call>{% endif -%}{{- '[e~[\n' -}}
{%- endfor -%}"""

SOURCE = open_source("demo")
TOKENIZER, TEMPLATE = load_tokenizer(SOURCE), load_template(SOURCE)
CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "成都", "days": 2}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CHAT = {
    "tools": [TOOL],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "reasoning_content": "Look it up.", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ],
}


def one(name: str, *texts: str, weight: float | None = None) -> TextSet:
    return TextSet(name, tuple(Document(t, name, f"{name}:{i}") for i, t in enumerate(texts)), weight)


def test_the_chat_template_of_the_checkpoint_is_used() -> None:
    assert TEMPLATE is not None
    chat = parse_line(json.dumps({"messages": CHAT["messages"][:2]}))
    assert isinstance(chat, Chat)
    assert TEMPLATE.render(chat) == "]~!b[]~b]system\nBe brief.[e~[\n]~b]user\nWeather?[e~[\n"
    ids = TOKENIZER.encode(TEMPLATE.render(chat), add_special_tokens=False).ids
    assert ids[:2] == [TOKENIZER.token_to_id("]~!b["), TOKENIZER.token_to_id("]~b]")]
    assert TOKENIZER.token_to_id("[e~[") in ids


def test_thinking_and_calls_are_there_whether_or_not_the_template_knows_them() -> None:
    assert TEMPLATE is not None
    chat = parse_line(json.dumps(CHAT))
    assert isinstance(chat, Chat)
    for template in (TEMPLATE, ChatTemplate(M2_STYLE, {}, "M2")):
        text = template.render(chat)
        assert "<think>\nLook it up.\n</think>" in text
        assert '<minimax:tool_call>\n<invoke name="look">\n<parameter name="city">成都</parameter>' in text
        assert '<parameter name="days">2</parameter>' in text
        assert text.count("<tool>") == 1
        assert "]~b]tool\nrain" in text
        assert text.count("<think>") == 1


def test_jinja2_of_transformers_renders_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    compile_template = transformers.utils.chat_template_utils._compile_jinja_template
    for messages in (CHAT["messages"][:2], CHAT["messages"]):
        theirs = compile_template(M2_STYLE).render(messages=messages, tools=CHAT["tools"])
        chat = parse_line(json.dumps({"messages": messages, "tools": CHAT["tools"]}))
        assert isinstance(chat, Chat)
        assert ChatTemplate(M2_STYLE, {}, "M2").render(chat) == theirs


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list, expected an object"),
        ("{}", "keys none: no known form, expected text | messages"),
        ('{"messages": []}', "keys 'messages': no known form"),
        ('{"a": 1, "b": [2]}', "keys 'a', 'b': no known form, expected text | messages [role, content] | conv"),
        ('{"messages": "x"}', "messages are a str, expected a list"),
        ('{"text": null}', "keys 'text': no known form"),
        ('{"conversations": [{"from": "alien", "value": "x"}]}', "message 1 has role 'alien'"),
        ("[" * 10_000, "not JSON"),
        ('{"text": ' + "1" * 5000 + "}", "not JSON"),
        ('{"messages": ["x"]}', "message 1 is a str"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "message 1 has role 'bot'"),
        ('{"messages": [{"role": "user"}]}', "message 1 has neither content nor tool_calls"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1 has content of type int"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{}]}]}', "a tool call without a function name"),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
            "calls f with arguments that are not JSON",
        ),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": "f"}', '"tools" is not a list of objects'),
    ],
)
def test_a_wrong_line_is_named_with_file_number_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(CHAT) + "\n\n" + line + "\n", "utf-8")
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        read_sets([str(file)], TEMPLATE)
    assert str(caught.value).startswith(f"{file}: line 3: ")
    assert "\n" not in str(caught.value)


def test_a_template_that_complains_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "x"}]}', "utf-8")
    template = ChatTemplate("{{ raise_exception('no system message') }}", {}, "model/chat_template.jinja")
    with pytest.raises(ValueError, match=r"line 1: model/chat_template.jinja: no system message"):
        read_sets([str(file)], template)
    with pytest.raises(ValueError, match="no chat template"):
        read_sets([str(file)], None)


def test_files_folders_weights_and_domains(tmp_path: Path) -> None:
    (tmp_path / "set" / "law").mkdir(parents=True)
    (tmp_path / "set" / "law" / "a.txt").write_text("first " * 30)
    (tmp_path / "set" / "law" / "b.txt").write_text("second " * 30)
    (tmp_path / "set" / "code.md").write_text("third " * 60)
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHAT) + "\n" + json.dumps({"text": "plain"}))
    found = read_sets([f"{tmp_path}/set=2", str(tmp_path / "chat.jsonl")], TEMPLATE)
    assert [(s.name, len(s.documents)) for s in found] == [("code", 1), ("law", 2), ("chat", 2)]
    assert found[2].weight is None
    assert found[0].weight is not None
    assert found[1].weight is not None
    assert found[0].weight + found[1].weight == pytest.approx(2.0)
    assert found[2].documents[1].text == "plain"
    assert found[2].documents[1].origin == "chat.jsonl:2"


@pytest.mark.parametrize("spec", ["{}=0", "{}=-1", "{}=much", "{}=nan", "{}=inf"])
def test_a_weight_that_is_none_is_refused(tmp_path: Path, spec: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    with pytest.raises(ValueError, match="expected a positive number"):
        read_sets([spec.format(file)])


def test_bad_text_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"abc\xff\xfe")
    (tmp_path / "none").mkdir()
    for name, reason in (
        ("missing.txt", "no such file or folder"),
        ("empty.txt", "empty, expected text"),
        ("binary.txt", "byte 3 is not UTF-8"),
        ("none", "no text in this folder"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            read_sets([str(tmp_path / name)])
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ValueError, match=r"\d+ tokens in the longest set, expected one window of 512"):
        pack_windows([one("a", "short text")], TOKENIZER, 512)


def test_windows_hold_the_documents_tokens_in_order_and_no_bos() -> None:
    texts = [f"number {i} of the documents, " * 40 for i in range(3)]
    corpus = pack_windows([one("a", *texts)], TOKENIZER, 16, seed=5)
    order = np.random.default_rng(5).permutation(3)
    ids = [t for i in order for t in TOKENIZER.encode(texts[i], add_special_tokens=False).ids]
    flat = corpus.tokens.flatten().tolist()
    assert flat == ids[: len(flat)]
    assert len(ids) - len(flat) < 16
    assert TOKENIZER.token_to_id("]~!b[") not in flat


def test_the_mix_follows_weights_seed_and_budget() -> None:
    sets = [one("a", "alpha beta gamma " * 2000, weight=3.0), one("b", "delta epsilon " * 2000, weight=1.0)]
    corpus = pack_windows(sets, TOKENIZER, 32, windows=40)
    assert torch.bincount(corpus.domain).tolist() == [30, 10]
    first = corpus.domain[:20]
    assert abs(int((first == 0).sum()) - 15) <= 1  # a part is a sample of the whole
    assert corpus.fingerprint == pack_windows(sets, TOKENIZER, 32, windows=40).fingerprint
    assert corpus.fingerprint != pack_windows(sets, TOKENIZER, 32, windows=39).fingerprint
    assert corpus.describe()["windows_by_domain"] == {"a": 30, "b": 10}
    other = [one("a", *[f"alpha {i} beta " * 50 for i in range(9)])]
    assert (
        pack_windows(other, TOKENIZER, 32, seed=0).fingerprint != pack_windows(other, TOKENIZER, 32, seed=1).fingerprint
    )


@given(
    st.lists(st.tuples(st.integers(0, 50), st.none() | st.floats(0.1, 10)), min_size=1, max_size=5),
    st.none() | st.integers(1, 200),
)
def test_shares_never_exceed_what_there_is_and_use_the_budget(
    sets: list[tuple[int, float | None]], windows: int | None
) -> None:
    available, weights = [a for a, _ in sets], [w for _, w in sets]
    if not sum(available):
        return
    counts = shares(available, weights, windows)
    assert all(0 <= c <= a for c, a in zip(counts, available, strict=True))
    if windows is not None:
        assert sum(counts) == min(windows, sum(available))
    elif all(w is None for w in weights):
        assert counts == available


def test_emphasis_multiplies_what_a_set_counts_without_a_weight() -> None:
    assert shares([100, 100], [None, None], 40, [3.0, 1.0]) == [30, 10]
    assert shares([20, 100], [None, None], 40, [30.0, 1.0]) == [20, 20]  # all that there is, and no more
    assert shares([100, 100], [1.0, 1.0], 40, [3.0, 1.0]) == [20, 20]  # a weight is a weight
    assert shares([100, 100], [None, None], None, [3.0, 1.0]) == [100, 100]


WORDS = [f"word{i}" for i in range(8000)]


def test_overlap_is_found_at_its_length_and_named() -> None:
    known = shingles(" ".join(WORDS[:2000]))
    fresh = " ".join(WORDS[2000:])
    check_disjoint([("fresh", fresh)], known)
    short = fresh + " " + " ".join(WORDS[100 : 100 + PASSAGE - 1])
    check_disjoint([("short", short)], known)  # 49 words: a quotation
    copied = fresh + "\n" + ",  ".join(w.upper() for w in WORDS[100 : 100 + PASSAGE])
    found = overlap(copied, np.sort(known))
    assert (found.longest, found.shared) == (PASSAGE, PASSAGE - 12)
    with pytest.raises(ValueError, match=r"evaluation.txt: overlaps the calibration text .* longest passage 50 words"):
        check_disjoint([("evaluation.txt", copied)], known)


def test_many_short_overlaps_are_refused_too() -> None:
    known = shingles(" ".join(WORDS[:2000]))
    scattered = " ".join(
        " ".join((*WORDS[2000 + 30 * i : 2030 + 30 * i], *WORDS[30 * i : 30 * i + 20])) for i in range(40)
    )
    assert overlap(scattered, np.sort(known)).longest < PASSAGE
    assert overlap(scattered, np.sort(known)).refused


def test_chinese_is_compared_by_character() -> None:
    text = (bundled("calibration") / "zh" / "lunyu.txt").read_text("utf-8")
    assert overlap(text[300:420], np.sort(shingles(text))).refused
    assert len(shingles("一二三四五六七八九十甲乙丙")) == 1
    assert len(shingles("one two three")) == 0


def test_the_bundled_sets_are_disjoint_and_speak_several_languages() -> None:
    calibration, evaluation = read_sets(["default"], TEMPLATE), read_sets([str(bundled("evaluation"))], TEMPLATE)
    judged = {"chat", "code", "docs", "prose", "zh"}
    assert {s.name for s in evaluation} == judged
    assert {s.name for s in calibration} == judged | {"data", "dialogue", "languages", "mathematics"}
    known = np.concatenate([shingles(d.text) for s in calibration for d in s.documents])
    check_disjoint(((d.origin, d.parts()) for s in evaluation for d in s.documents), known)
    assert sum(len(d.text) for s in calibration if s.name == "zh" for d in s.documents) > 9000
    chats = "".join(d.text for s in calibration if s.name == "chat" for d in s.documents)
    for sign in ("<think>", "<minimax:tool_call>", "]~b]tool", "的", "です", "что", " und ", " que ", " est ", "니다"):
        assert sign in chats


def test_bundled_windows_lean_to_chats_prose_and_chinese_from_the_first_on() -> None:
    """Shares follow text times emphasis, also under a weight; the first quarter of the windows has the same ones."""
    sets = read_sets(["default"], TEMPLATE)
    wanted = {s.name: s.characters * EMPHASIS.get(s.name, 1.0) for s in sets}
    for part in read_sets(["default=0.4"], TEMPLATE):
        assert part.weight == pytest.approx(0.4 * wanted[part.name] / sum(wanted.values()))
    corpus = pack_windows(sets, TOKENIZER, 512, 128)
    counts = corpus.describe()["windows_by_domain"]
    natural = pack_windows([replace(s, emphasis=1.0) for s in sets], TOKENIZER, 512, 128)
    before = natural.describe()["windows_by_domain"]
    assert all(counts[name] > before[name] for name in ("chat", "docs", "prose", "zh"))
    assert all(counts[name] < before[name] for name in ("data", "languages"))
    assert min(count for name, count in counts.items() if name != "dialogue") >= 5
    first = torch.bincount(corpus.domain[:32], minlength=len(corpus.domains)).tolist()
    assert all(abs(4 * n - counts[name]) <= 4 for n, name in zip(first, corpus.domains, strict=True))


def test_every_bundled_text_names_its_origin_and_licence() -> None:
    """Rows of JSONL by their source, text files by name; each licence is known, and its text and notice are there."""
    folder = bundled("calibration").parent
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (folder / "SOURCES.md").read_text("utf-8").splitlines()
        if line.startswith("|")
    ]
    sources = {cells[0]: cells for cells in lines if len(cells) == 5}
    files = [re.findall(r"`([^`]+)`", cells[0]) for cells in lines if len(cells) == 3 and cells[2]]
    named = {name for found in files for name in [found[0] if found else "", *found[1:]]}
    used: set[str] = set()
    for path in sorted(bundled("calibration").rglob("*")):
        if path.suffix == ".jsonl":
            used |= {json.loads(line)["source"] for line in path.read_text("utf-8").splitlines()}
        elif path.is_file():
            inside = path.relative_to(folder).as_posix()
            assert inside in named or path.name in named or f"{inside.rpartition('/')[0]}/*.txt" in named, inside
    assert used == set(sources) - {"source", "---"}
    notices = (folder / "LICENSES.md").read_text("utf-8")
    for source in used:
        _, what, _, licence, holder = sources[source]
        assert what
        assert licence in ("MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "PSF-2.0", "public domain"), source
        if licence != "public domain" and source != "mmquant":
            assert f"\n## {licence}\n" in notices
            assert f"- {source}: Copyright (c) {holder}\n" in notices


def test_the_bundled_text_is_small_in_a_wheel_and_broad() -> None:
    paths = [path for path in sorted(bundled("calibration").rglob("*")) if path.is_file()]
    assert sum(len(zlib.compress(path.read_bytes())) for path in paths) < 1_500_000
    rows = [json.loads(line) for line in (bundled("calibration") / "code" / "packages.jsonl").open(encoding="utf-8")]
    assert max(len(row["text"]) for row in rows) <= 6000
    assert len({row["source"] for row in rows}) >= 20
