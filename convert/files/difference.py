"""Name the first setting in which two runs differ, as the user wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .parse import is_object

# What decides a run's bytes, by its name in the run -> what a user wrote; the rest is told by its own name.
OPTIONS = {
    "command": "the command",
    "source": "the checkpoint",
    "model": "the checkpoint",
    "shard_limit": "--max-shard-size",
    "part_bytes": "--max-part-size",
    "layout": "--format",
    "weighting": "--weighting",
    "full": "--moments",
    "stored": "--store",
    "type": "--type",
    "overrides": "--tensor-type",
    "sets": "--text",
    **{
        name: f"--{name.replace('_', '-')}"
        for name in ("scheme", "method", "group_size", "attention", "effort", "eight_bit", "kv_cache", "asymmetric",
                     "windows", "context", "seed", "experts", "propagate", "dtype", "plan", "name", "format")
    },
}  # fmt: skip
FIRST = ("command", "source", "model", "windows", "context", "seed", "sets")  # what is worth telling before its effects
SHOWN = 32  # characters of a value


def first_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The first thing in which two runs differ, in words: "--windows 256, now 8". Empty when they are equal."""
    keys = [*(key for key in FIRST if key in found or key in expected), *expected, *found]
    for key in dict.fromkeys(keys):
        have, want = found.get(key), expected.get(key)
        if have == want:
            continue
        if is_object(have) and is_object(want):
            return first_difference(have, want)
        name = OPTIONS.get(key, key)
        if key in ("source", "model", "sets"):
            return f"another {name.removeprefix('the ')}" if key != "sets" else "another --text"
        return f"{name} {short(have)}, now {short(want)}"
    return ""


def short(value: object) -> str:
    """A value in a message."""
    text = "not given" if value is None else str(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
