"""Parse JSON and YAML from outside: one checked parser of each, and typed access to JSON's values.

What a hub or a file says is hostile until it is checked. Every fault is an InputError of one line that names the place.
"""

from __future__ import annotations

import json
import math
import reprlib
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, overload

from mmquant.errors import InputError

DEEPEST = 64  # levels of nesting; configs, tokenizers and indexes stay below ten
LONGEST_NUMBER = 40  # characters; tokenizer_config.json of the field has 1000000000000000019884624838656
LARGEST = 1 << 62  # of what counts something
SMALL_LIMIT = 64 << 20  # bytes of a file that is read whole: configs, tokenizers, templates, licences
LONGEST_PATH = 1024
# What PyYAML's constructors raise besides YAMLError, for 2024-13-45, !!int "", !!bool x, deep nesting ...
YAML_FAULTS = (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)
NAMES: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}

T = TypeVar("T")
D = TypeVar("D")
_REQUIRED: Any = object()


def parse_any(data: bytes | bytearray | str, where: str, unique: bool = False) -> Any:  # noqa: ANN401 - where JSON comes in
    """The value of a JSON text: UTF-8 (a BOM is skipped), finite numbers, valid Unicode, at most DEEPEST levels.

    unique: a name that stands twice in one object is refused; else the last one counts. Raises InputError.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        hook = _once if unique else None
        value = json.loads(
            text, parse_int=_integer, parse_float=_real, parse_constant=_constant, object_pairs_hook=hook
        )
        if isinstance(data, str):
            data.encode()  # half of a surrogate pair: UnicodeEncodeError, a ValueError
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise InputError(f"{where}: JSON nested deeper than {DEEPEST} levels") from None
    except ValueError as error:  # of json, of the decoder, of the functions below
        raise InputError(f"{where} is not JSON ({one_line(error)})") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth_exceeds(value, DEEPEST):
        raise InputError(f"{where}: JSON nested deeper than {DEEPEST} levels")
    return value


def parse_json(data: bytes | bytearray | str, where: str, unique: bool = False) -> dict[str, Any]:
    """A JSON object, else an InputError that says where it is broken."""
    value = parse_any(data, where, unique)
    if not is_object(value):
        raise InputError(f"{where}: JSON {short(value)}, expected an object")
    return value


def parse_yaml(data: bytes | str, where: str) -> Any:  # noqa: ANN401 - where YAML comes in
    """The value of a YAML text in UTF-8. InputError, also for a word that only looks like a date or a number."""
    import yaml

    try:
        return yaml.safe_load(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except (yaml.YAMLError, *YAML_FAULTS) as error:
        found = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise InputError(f"{where} is not YAML ({found})") from None


def read_small(path: Path, where: str, expected: str) -> bytes:
    """A whole file, up to SMALL_LIMIT. InputError for more (a device has no end) and for what cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(SMALL_LIMIT + 1)
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}, expected {expected}") from None
    if len(data) > SMALL_LIMIT:
        raise InputError(f"{where}: more than {SMALL_LIMIT:,} bytes, expected {expected}")
    return data


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a JSON value is an object, for the type checker: `isinstance` leaves its keys and values unknown."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a JSON value is a list, for the type checker: `isinstance` leaves its items unknown."""
    return isinstance(value, list)


def are(values: list[Any], kind: type[T]) -> TypeGuard[list[T]]:
    """Whether all items of a JSON list are of `kind`, as `is_a` understands it."""
    return all(is_a(value, kind) for value in values)


@overload
def take(mapping: Mapping[str, Any], key: str, kind: type[dict[str, Any]], where: str) -> dict[str, Any]: ...
@overload
def take(mapping: Mapping[str, Any], key: str, kind: type[list[Any]], where: str) -> list[Any]: ...
@overload
def take(mapping: Mapping[str, Any], key: str, kind: type[T], where: str) -> T: ...
@overload
def take(
    mapping: Mapping[str, Any], key: str, kind: type[dict[str, Any]], where: str, default: dict[str, Any]
) -> dict[str, Any]: ...
@overload
def take(
    mapping: Mapping[str, Any], key: str, kind: type[dict[str, Any]], where: str, default: None
) -> dict[str, Any] | None: ...
@overload
def take(mapping: Mapping[str, Any], key: str, kind: type[list[Any]], where: str, default: list[Any]) -> list[Any]: ...
@overload
def take(
    mapping: Mapping[str, Any], key: str, kind: type[list[Any]], where: str, default: None
) -> list[Any] | None: ...
@overload
def take(mapping: Mapping[str, Any], key: str, kind: type[T], where: str, default: D) -> T | D: ...
def take(mapping: Mapping[str, Any], key: str, kind: type, where: str, default: Any = _REQUIRED) -> Any:
    """mapping[key] as a `kind` (str, int, float, bool, list, dict); an absent or null one is the default.

    An integer that is taken for a float becomes one, true and false are no numbers, sizes beyond LARGEST are refused.
    Raises InputError, also for a missing key without a default.
    """
    value = mapping.get(key)
    if value is None:
        if default is _REQUIRED:
            raise InputError(f"{where}: {key} is missing, expected {NAMES[kind]}")
        return default
    if not is_a(value, kind):
        raise InputError(f"{where}: {key} is {short(value)}, expected {NAMES[kind]}")
    return float(value) if kind is float else value


@overload
def take_list(
    mapping: Mapping[str, Any], key: str, kind: type[dict[str, Any]], where: str, default: list[Any] | None = None
) -> list[dict[str, Any]]: ...
@overload
def take_list(
    mapping: Mapping[str, Any], key: str, kind: type[T], where: str, default: list[T] | None = None
) -> list[T]: ...
def take_list(
    mapping: Mapping[str, Any], key: str, kind: type, where: str, default: list[Any] | None = None
) -> list[Any]:
    """mapping[key] as a list whose items are all of `kind`; InputError else, and when it is missing without default."""
    values = take(mapping, key, list, where) if default is None else take(mapping, key, list, where, default)
    for number, value in enumerate(values):
        if not is_a(value, kind):
            raise InputError(f"{where}: {key}[{number}] is {short(value)}, expected {NAMES[kind]}")
    return values


def take_map(mapping: Mapping[str, Any], key: str, kind: type[T], where: str) -> dict[str, T]:
    """mapping[key] as an object whose values are all of `kind`. Raises InputError."""
    values = take(mapping, key, dict, where)
    for name, value in values.items():
        if not is_a(value, kind):
            raise InputError(f"{where}: {key}.{reprlib.repr(name)} is {short(value)}, expected {NAMES[kind]}")
    return values


def is_a(value: object, kind: type) -> bool:
    """Whether a JSON value is a `kind`, as `take` understands it."""
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            return False
        return -LARGEST < value < LARGEST
    return isinstance(value, kind)


def path_fault(path: object) -> str | None:
    """Why a name from outside must not be joined to a folder; None for a plain relative path with `/` between names.

    Refused: empty, absolute, climbing, drive letters and streams (`:`), backslashes, control and formatting characters,
    halves of surrogate pairs, look-alikes of separators and dots (what NFKC makes of them), names longer than file
    systems take, and `.git`, whose hooks git would run.
    """
    if not isinstance(path, str) or not path or len(path) > LONGEST_PATH:
        return "expected a relative path"
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in path):
        return "it holds control characters"
    for form in {path, unicodedata.normalize("NFKC", path)}:
        if any(c in form for c in "\\:"):
            return "it holds a backslash or a colon"
        if any(_bad_name(name) for name in form.split("/")):
            return "expected a relative path of plain names"
    return None


def _bad_name(name: str) -> bool:
    plain = name.rstrip(". ").lower()  # as Windows takes a name
    return plain in ("", ".git", "git~1") or len(name.encode()) > 255


def short(value: object) -> str:
    """A value as an error quotes it: one short line."""
    return one_line(reprlib.repr(value))


def one_line(error: object) -> str:
    """Text of an error, or of anything, in one printable line of bounded length."""
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= 300 else text[:297] + "..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{reprlib.repr(twice)} stands twice")
    return out


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {reprlib.repr(text)} is not finite")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _depth_exceeds(value: object, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _inside(value: object) -> Iterable[object]:
    return value.values() if is_object(value) else value if is_list(value) else ()
