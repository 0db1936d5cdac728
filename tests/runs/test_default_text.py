"""`default` is the bundled text wherever a text is named: what an option takes when nothing is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmquant.calibration.text.chat import load_template
from mmquant.calibration.text.corpus import DEFAULT, read_sets
from mmquant.calibration.text.sample import read_texts
from mmquant.convert.open import open_native
from mmquant.runs import options, options_use
from mmquant.runs.corpus import make_corpus
from mmquant.runs.evaluation.text import make_eval_sample
from mmquant.runs.options import TextOptions
from mmquant.runs.options_use import EvalOptions

TEXTS = {"text", "evaluation"}


def test_every_option_that_names_a_text_says_default() -> None:
    classes = [kind for module in (options, options_use) for kind in vars(module).values() if isinstance(kind, type)]
    fields = [field for kind in classes if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)]
    helps = {field.metadata["help"] for field in fields if field.name in TEXTS}
    assert len(helps) == 4
    assert not [text for text in helps if "`default`" not in text]


@pytest.mark.parametrize("side", ["calibration", "evaluation"])
def test_default_is_the_bundled_text_of_its_side(side: str) -> None:
    template = load_template(open_native("demo"))
    named, bare = ([part.sha256 for part in read_sets(given, template, side=side)] for given in ([DEFAULT], []))
    assert named == bare
    (mixed, *_) = read_sets([f"{DEFAULT}=0.5"], template, side=side)
    assert mixed.sha256 == named[0]


def test_default_as_evaluation_text() -> None:
    source = open_native("demo")
    template = load_template(source)
    named, bare, other = (read_texts(given, template) for given in ([DEFAULT], [], [f"mine={DEFAULT}"]))
    assert [(text.domain, text.digest) for text in named] == [(text.domain, text.digest) for text in bare]
    assert {text.domain for text in other} == {"mine"}
    for convention in ("all", "llama.cpp"):
        found = [
            make_eval_sample(source, (), EvalOptions(text=given, convention=convention)) for given in ((), (DEFAULT,))
        ]
        assert torch.equal(found[0].tokens, found[1].tokens)


def test_calibration_is_held_against_the_evaluation_text_that_default_names() -> None:
    """Not against the calibration text of that name, which is all that it calibrates on."""
    source = open_native("demo")
    named, bare = (make_corpus(source, TextOptions(windows=4, evaluation=given)) for given in ((DEFAULT,), ()))
    assert named.fingerprint == bare.fingerprint
