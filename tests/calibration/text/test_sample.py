"""Evaluation windows: scored positions by every convention, and texts that cannot be scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from mmquant.calibration.text.sample import Text, make_sample, read_text, read_texts


def letters() -> Tokenizer:
    """One token a letter: id = place in the alphabet."""
    vocab = {chr(ord("a") + i): i for i in range(26)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def text_of(length: int, domain: str = "d") -> Text:
    whole = "".join(chr(ord("a") + i % 26) for i in range(length))
    return Text(f"{domain}.txt", domain, "0" * 64, (whole,))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.data())
def test_every_token_but_the_first_is_predicted_once(context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    length = data.draw(st.integers(context, 60))
    sample = make_sample([text_of(length)], letters(), context, stride=stride)
    predicted = [
        window * stride + position + 1
        for window in range(sample.windows)
        for position in range(int(sample.first[window]), context - 1)
    ]
    assert len(predicted) == len(set(predicted)) == int(sample.scored.sum())
    if stride < context:
        assert predicted == list(range(1, predicted[-1] + 1))
    ids = [i % 26 for i in range(length)]
    for window in range(sample.windows):
        assert sample.tokens[window].tolist() == ids[window * stride : window * stride + context]


def test_llama_perplexity_scores_the_second_half() -> None:
    """n_ctx - 1 - n_ctx / 2 positions a chunk, the first at n_ctx / 2 (tools/perplexity/perplexity.cpp)."""
    for context in (8, 9):
        sample = make_sample([text_of(50)], letters(), context, convention="llama.cpp")
        assert sample.windows == 50 // context
        assert set(sample.first.tolist()) == {context // 2}
        assert set(sample.scored.tolist()) == {context - 1 - context // 2}
    with pytest.raises(ValueError, match=r"the convention of llama\.cpp has none"):
        make_sample([text_of(50)], letters(), 8, convention="llama.cpp", stride=4)


def test_windows_are_shared_between_texts() -> None:
    texts = [text_of(100, "long"), text_of(25, "short"), text_of(60, "middle")]
    sample = make_sample(texts, letters(), 10, count=11)
    assert [t["windows"] for t in sample.texts] == [5, 2, 4]
    assert sample.domains == ("long", "short", "middle")
    assert sample.domain.tolist() == [0] * 5 + [1] * 2 + [2] * 4
    assert make_sample(texts, letters(), 10).windows == 10 + 2 + 6


def test_units_are_documents_where_there_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"text": "abcdefghij" * 3}) for _ in range(9)) + "\n\n")
    sample = make_sample([read_text(path)], letters(), 15)
    assert sample.unit == "document"
    assert sample.document.tolist() == [i // 2 for i in range(18)]
    assert len(sample.units()) == int(sample.scored.sum())
    few = make_sample([text_of(100)], letters(), 10)
    assert few.unit == "window"
    np.testing.assert_array_equal(np.unique(few.units()), np.arange(10))


def test_part_of_a_sample_is_the_same_windows() -> None:
    whole = make_sample([text_of(100), text_of(40, "e")], letters(), 10, stride=5)
    part = whole.part(range(7, 21))
    assert part.tokens.tolist() == whole.tokens[7:21].tolist()
    assert part.first.tolist() == whole.first[7:21].tolist()
    assert whole.fingerprint() != part.fingerprint()


def test_domains_by_name_and_folder(tmp_path: Path) -> None:
    (tmp_path / "code.txt").write_text("abc")
    (tmp_path / "prose.raw").write_text("abc")
    (tmp_path / "notes.md").write_text("abc")
    assert [t.domain for t in read_texts([tmp_path])] == ["code", "prose"]
    assert [t.domain for t in read_texts([f"zh={tmp_path / 'code.txt'}"])] == ["zh"]
    assert len(read_texts([tmp_path])[0].sha256) == 64
    named = tmp_path / "a=b.txt"
    named.write_text("abc")
    assert [t.domain for t in read_texts([named])] == ["a=b"], "a file that is there is no DOMAIN=PATH"


def test_bad_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="9 tokens, shorter than one window of 10"):
        make_sample([text_of(9)], letters(), 10)
    with pytest.raises(ValueError, match="no such text file"):
        read_texts([tmp_path / "none.txt"])
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="byte 2 is not UTF-8"):
        read_texts([tmp_path / "bad.txt"])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_texts([tmp_path / "bad.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.txt"):
        read_texts([tmp_path / "empty"])
    with pytest.raises(ValueError, match="stride 11"):
        make_sample([text_of(50)], letters(), 10, stride=11)
    with pytest.raises(ValueError, match="convention 'half'"):
        make_sample([text_of(50)], letters(), 10, convention="half")
