"""Arguments for an engine that mmquant starts: `--engine-arg KEY=VALUE`, checked before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mmquant.errors import InputError, suggest

from ..convert.files.parse import is_list

OPTION = "--engine-arg"
# How `vllm serve` reads lists that are not several words behind their flag: as JSON, and one word each time.
# Source: vLLM 0.26, entrypoints/openai/cli_args.py (FrontendArgs).
AS_JSON = ("allowed_origins", "allowed_methods", "allowed_headers")
APPENDED = ("middleware",)


def parse_arguments(words: Iterable[str], own: Mapping[str, str]) -> dict[str, Any]:
    """What KEY=VALUE words say, by key with underscores; a VALUE is JSON, else text.

    own: what mmquant sets itself, by key, with what a user should type instead. InputError for such a key, one that
    is given twice, and what is no KEY=VALUE.
    """
    found: dict[str, Any] = {}
    for word in words:
        typed, equals, value = word.partition("=")
        key = typed.strip().removeprefix("--").replace("-", "_")
        if not equals or not re.fullmatch("[a-z][a-z0-9_]{0,63}", key):
            raise InputError(f"{OPTION} {word[:96]}: expected KEY=VALUE, as in gpu_memory_utilization=0.5")
        if key in own:
            raise InputError(f"{OPTION} {key}: mmquant sets it, expected {own[key]}")
        if key in found:
            raise InputError(f"{OPTION} {key}: given twice")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:  # noqa: ANN401 - any JSON
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def check_known(arguments: Iterable[str], known: Iterable[str], engine: str) -> None:
    """InputError for an argument that the engine does not have, with the nearest of those that it has."""
    names = sorted(known)
    for key in arguments:
        if key not in names:
            near = suggest(key, names)
            raise InputError(f"{OPTION} {key}: {engine} has none{'; ' + near if near.startswith('did') else ''}")


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """The same on the command line of `vllm serve`: --key=VALUE; true is --key, false --no-key, null nothing.

    A list is several words behind --key, but JSON or a --key=WORD for each where vLLM reads it so. InputError for a
    list of words that vLLM would take for something else.
    """
    words: list[str] = []
    for key, value in arguments.items():
        name = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name[2:]}")
        elif is_list(value) and key not in AS_JSON:
            words += _several(name, value)
        elif value is not None:
            words.append(f"{name}={_word(value)}")
    return words


def _several(name: str, values: list[object]) -> list[str]:
    if name[2:] in APPENDED:
        return [f"{name}={_word(value)}" for value in values]
    strange = next((value for value in values if isinstance(value, str) and value.startswith("-")), None)
    if strange is not None or not values:
        found = "an empty list" if strange is None else strange[:96]
        raise InputError(f"{OPTION} {name[2:]}: {found}, expected words that do not begin with -")
    return [name, *map(_word, values)]


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
