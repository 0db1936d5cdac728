"""Find the Python files that `auto_map` names: carry them, or remove its entries.

With trust_remote_code an engine imports MODULE.py of the folder for "MODULE.Class", and what that file imports
relatively; a missing one ends the start. Source: transformers dynamic_module_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .files.parse import is_list, is_object

Read = Callable[[str], "bytes | None"]

_RELATIVE = re.compile(r"^[ \t]*(?:from[ \t]+\.(\w+)[ \t]+import\b|import[ \t]+\.(\w+)[ \t\r]*$)", re.MULTILINE)


def code_files(config: dict[str, Any], read: Read) -> dict[str, bytes]:
    """name -> bytes of every file that the entries kept by `with_code` need; `read` gives a file's bytes or None."""
    entries = config.get("auto_map")
    found: dict[str, bytes] = {}
    for value in entries.values() if is_object(entries) else ():
        found |= _of_entry(value, read) or {}
    return found


def with_code(config: dict[str, Any], read: Read) -> dict[str, Any]:
    """The config with those entries of auto_map whose code is there; without auto_map when none is left."""
    if "auto_map" not in config:
        return config
    entries = config["auto_map"] if is_object(config["auto_map"]) else {}
    kept = {key: value for key, value in entries.items() if _of_entry(value, read) is not None}
    if kept == config["auto_map"] and kept:
        return config
    rest = {key: value for key, value in config.items() if key != "auto_map"}
    return {**rest, "auto_map": kept} if kept else rest


def _of_entry(value: object, read: Read) -> dict[str, bytes] | None:
    """Files of one entry ("MODULE.Class", a list of such, "REPO--MODULE.Class": none here); None when one misses."""
    found: dict[str, bytes] = {}
    references = value if is_list(value) else [value]
    if not any(isinstance(reference, str) for reference in references):
        return None
    for reference in references:
        if reference is None or (isinstance(reference, str) and "--" in reference):
            continue
        match = re.fullmatch(r"(\w+)\.(\w+)", reference) if isinstance(reference, str) else None
        if match is None:
            return None
        waiting = [match[1]]
        while waiting:
            name = waiting.pop() + ".py"
            if name in found:
                continue
            data = read(name)
            if data is None:
                return None
            found[name] = data
            waiting += [first or second for first, second in _RELATIVE.findall(data.decode(errors="replace"))]
    return found
