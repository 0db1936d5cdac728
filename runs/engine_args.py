"""Arguments for an engine that mmquant starts: `--engine-arg KEY=VALUE`, checked before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mmquant.errors import InputError, suggest

from ..convert.files.parse import is_list

OPTION = "--engine-arg"


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
    """The same on a command line: --key=VALUE; true is --key, false --no-key, null nothing, a list several words."""
    words: list[str] = []
    for key, value in arguments.items():
        name = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name[2:]}")
        elif is_list(value):
            words += [name, *map(str, value)]
        elif value is not None:
            words.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    return words
