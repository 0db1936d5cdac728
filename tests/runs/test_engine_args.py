"""`--engine-arg`: what is typed, what it means, and what a command line makes of it."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from mmquant.errors import InputError
from mmquant.runs.engine_args import check_known, flags, parse_arguments


def test_values_are_json_or_text() -> None:
    typed = (
        "a=1",
        "--b-c=0.5",
        "d=true",
        "e=TRITON_ATTN",
        'f={"x": [1, 2]}',
        "g=",
        "h=x=y",
        "i=null",
        "j=" + "[" * 9999,
    )
    found = parse_arguments(typed, {})
    text = {"e": "TRITON_ATTN", "g": "", "h": "x=y", "j": "[" * 9999}
    assert found == {"a": 1, "b_c": 0.5, "d": True, "f": {"x": [1, 2]}, "i": None, **text}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("a",), "--engine-arg a: expected KEY=VALUE"),
        (("=1",), "--engine-arg =1: expected KEY=VALUE"),
        (("A b=1",), "--engine-arg A b=1: expected KEY=VALUE"),
        (("a=1", "--a=2"), "--engine-arg a: given twice"),
        (("own-thing=1",), "--engine-arg own_thing: mmquant sets it, expected --option"),
    ],
)
def test_what_is_no_argument_is_refused(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parse_arguments(words, {"own_thing": "--option"})


def test_an_argument_that_the_engine_has_not_is_named() -> None:
    check_known(["seed"], ["seed", "dtype"], "vllm")
    with pytest.raises(InputError, match=r"--engine-arg sed: vllm has none; did you mean seed\?"):
        check_known(["sed"], ["seed", "dtype"], "vllm")
    with pytest.raises(InputError, match=r"--engine-arg zzz: vllm has none$"):
        check_known(["zzz"], ["seed", "dtype"], "vllm")


def test_the_same_on_a_command_line() -> None:
    given = {"enforce_eager": True, "prefix": False, "share": 0.5, "backend": "T x", "config": {"a": [1]}, "none": None}
    words = ["--enforce-eager", "--no-prefix", "--share=0.5", "--backend=T x", '--config={"a": [1]}']
    assert flags(given) == words


def test_lists_are_read_as_vllm_reads_them() -> None:
    """By a parser of the same shapes: several words, JSON, one word each time (vLLM's own is not installed here)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--cudagraph-capture-sizes", nargs="+", type=int)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--allowed-origins", type=json.loads)
    parser.add_argument("--middleware", action="append")
    parser.add_argument("--port", type=int)
    given: dict[str, Any] = {"cudagraph_capture_sizes": [1, 2], "served_model_name": ["a b", "c"]}
    given |= {"allowed_origins": ["*", "http://x"], "middleware": ["m.one", "m.two"]}
    typed = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    found = parser.parse_args(["folder", *flags(parse_arguments(typed, {})), "--port", "7"])
    assert vars(found) == {"model": "folder", "port": 7, **given}
    assert flags({"lora_modules": [{"name": "a", "on": True}]}) == ["--lora-modules", '{"name": "a", "on": true}']
    for value, words in (([], "an empty list"), (["a", "--trust-remote-code"], "--trust-remote-code")):
        with pytest.raises(InputError, match=f"--engine-arg names: {words}, expected words that do not begin with -"):
            flags({"names": value})
