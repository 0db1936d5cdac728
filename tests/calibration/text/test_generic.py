"""Bundled windows beside a user's own: as many, evenly among them, and told apart in the manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmquant.calibration.gguf.run import Calibration
from mmquant.calibration.text.corpus import DEFAULT, pack_windows, read_sets
from mmquant.calibration.text.generic import generic_windows, together
from mmquant.calibration.text.tokenizer import load_tokenizer
from mmquant.convert.open import open_native
from mmquant.monitor import Silent, watching
from mmquant.runs.corpus import at_effort, generic_at_most, make_corpus, tokens_at_most, windows_at_most
from mmquant.runs.gguf import make_calibration
from mmquant.runs.options import CalibrateOptions, GgufOptions, Int4Options, TextOptions

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix potions "


def options(file: Path, **changes: Any) -> TextOptions:
    return replace(TextOptions(text=(str(file),), text_only=False, context=64, windows=8), **changes)


def test_twice_as_many_windows_of_bundled_text_stand_evenly_among_the_users(tmp_path: Path) -> None:
    source, file = open_native("demo"), tmp_path / "mine.txt"
    file.write_text(WORDS * 200)
    corpus = make_corpus(source, options(file))
    assert len(corpus.tokens) == windows_at_most(options(file)) == 24
    mine = corpus.domain == corpus.domains.index("mine")
    assert int(mine.sum()) == 8
    assert int(mine[:12].sum()) == 4  # half of the windows are a sample of the whole
    alone = make_corpus(source, options(file, text_only=True))
    assert torch.equal(corpus.tokens[mine], alone.tokens)
    assert [part.get("bundled", False) for part in corpus.settings["sets"]][:2] == [False, True]
    assert sum(part["windows"] for part in corpus.settings["sets"]) == 24
    assert len(corpus.seen) > len(alone.seen)


def test_no_bundled_text_twice_and_none_where_it_is_unwanted(tmp_path: Path) -> None:
    assert generic_at_most(options(tmp_path)) == 16
    for other in ({"text": ()}, {"text": (DEFAULT,)}, {"text": ("a.txt", "default=0.3")}, {"text_only": True}):
        assert generic_at_most(options(tmp_path, **other)) == 0
    assert generic_at_most(CalibrateOptions(text=("a.txt",), windows=8)) == 0  # has no such option


def test_without_a_template_the_chats_stay_out() -> None:
    corpus = pack_windows(read_sets([DEFAULT]), load_tokenizer(open_native("demo")), 64, 40)
    assert "chat" not in corpus.domains
    assert {"code", "docs", "prose", "zh", "languages"} <= set(corpus.domains)
    both = together(corpus, corpus)
    assert both.describe()["windows"] == sum(both.describe()["windows_by_domain"].values()) == 2 * len(corpus.tokens)


def test_dry_runs_count_the_bundled_windows(tmp_path: Path) -> None:
    source = open_native("demo")
    assert tokens_at_most(source, options(tmp_path)) == 64 * 24
    assert generic_windows(1) == 2


@pytest.mark.parametrize(("effort", "windows"), [("fast", 24), ("default", 24), ("high", 96)])
def test_high_effort_reads_four_times_as_much(tmp_path: Path, effort: str, windows: int) -> None:
    source, file = open_native("demo"), tmp_path / "mine.txt"
    file.write_text(WORDS * 800)
    chosen = make_calibration(source, GgufOptions(text=(str(file),), context=64, windows=8, effort=effort))
    assert isinstance(chosen, Calibration)
    assert len(chosen.tokens) == windows
    assert chosen.name == "mine.txt and bundled text"


def test_int4_learns_on_four_times_as_much_and_awq_does_not() -> None:
    assert at_effort(Int4Options(effort="high", windows=8)).windows == 32
    assert at_effort(Int4Options(windows=8)).windows == 8
    assert at_effort(Int4Options(method="awq", effort="high", windows=8)).windows == 8


class Heard(Silent):
    """Keeps messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(("words", "said"), [(20, 1), (800, 0)])
def test_high_effort_without_more_text_says_so(tmp_path: Path, words: int, said: int) -> None:
    source, file, heard = open_native("demo"), tmp_path / "mine.txt", Heard()
    file.write_text(WORDS * words)
    chosen = GgufOptions(text=(str(file),), text_only=True, context=64, windows=40, effort="high")
    with watching(heard):
        make_calibration(source, chosen)
        make_calibration(source, replace(chosen, effort="default"))
    assert len([line for line in heard.lines if "--effort high reads 4 times" in line]) == said
