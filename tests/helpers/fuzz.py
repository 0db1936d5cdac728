"""Damage files on purpose: seeded structured mutations of valid JSON and of binary headers.

    for data in mutants(valid, 1000, seed="config.json"): ...

JSON: types swapped, numbers huge, negative, NaN, deep nesting, lone surrogates, truncation, duplicate keys, bit flips.
Binary: bits flipped, words made huge or zero, cut, lengthened.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 255, 1 << 31, (1 << 62) + 1, 1 << 64, 10**30, -(10**18), 0.5, -0.0, 1e-300),
    *(1e300, "", "x", "0", "\ud800", "a\nb", "\0", "../../evil", "/tmp/evil", "é" * 300, [], {}, [[]], {"": {}}),
    *([None], [1, -1], ["x"], {"a": 1}, [0] * 9, float("nan"), float("inf"), -float("inf")),
]
RAW = [
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b'"\\ud800"',
    b"\xff\xfe",
]
RAW += [b"", b" ", b"\xef\xbb\xbf", b"null", b"[]", b"{}", b'""', b"0", b"\x00", b"-", b"[" * 70 + b"]" * 70]
WORDS = [
    b"\xff" * 8,
    b"\x00" * 8,
    b"\xff" * 7 + b"\x7f",
    b"\x01" * 8,
    b"\x00" * 7 + b"\x80",
    b"\x00\x00\x00\x40" + bytes(4),
]


def mutants(valid: bytes, count: int, seed: str, header: int | None = None) -> Iterator[bytes]:
    """`count` damaged forms of `valid`; JSON when `header` is None, else a binary file with so many bytes of header."""
    draw = random.Random(seed)
    for _ in range(count):
        yield broken_bytes(draw, valid, header) if header is not None else broken_json(draw, valid)


def broken_json(draw: random.Random, valid: bytes) -> bytes:
    kind = draw.randrange(10)
    if kind == 0:
        return draw.choice(RAW)
    if kind == 1:
        return broken_bytes(draw, valid, len(valid))
    changed = json.loads(valid)
    for _ in range(draw.randint(1, 2)):
        changed = changed_once(draw, changed)
    text = json.dumps(changed).encode()
    if kind == 2:  # a raw token in a random place of the text
        at = draw.randrange(len(text) + 1)
        return text[:at] + draw.choice(RAW) + text[at:]
    if kind == 3 and b'":' in text:  # every key twice
        return text.replace(b'{"', b'{"a": 1, "a": 2, "', 1)
    return text


def changed_once(draw: random.Random, value: Any) -> Any:
    """One place of the tree changed: replaced, removed, added to or given another type."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.05:
        return copy.deepcopy(draw.choice(VALUES))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw.choice(keys)
    inner = value[key]
    if isinstance(inner, dict | list) and inner and draw.random() < 0.6:
        value[key] = changed_once(draw, inner)
        return value
    how = draw.randrange(5)
    if how == 0:
        del value[key]
    elif how == 1 and isinstance(value, dict):
        value[draw.choice(["", "x", "../evil", "\ud800", "__metadata__", str(key) + "\n"])] = inner
    elif how == 2 and isinstance(inner, int) and not isinstance(inner, bool):
        value[key] = draw.choice(
            [inner + 1, inner - 1, -inner, inner * 2, inner << 40, inner + 0.5, str(inner), [inner]]
        )
    elif how == 3:
        value[key] = {"a": inner}
    else:
        value[key] = copy.deepcopy(draw.choice(VALUES))
    return value


def broken_bytes(draw: random.Random, valid: bytes, header: int) -> bytes:
    broken = bytearray(valid)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(max(1, header))
        if at >= len(broken):
            continue
        if draw.random() < 0.4:
            broken[at] ^= 1 << draw.randrange(8)
        elif draw.random() < 0.5:
            broken[at] = draw.randrange(256)
        else:
            broken[at : at + 8] = draw.choice(WORDS)
    length = draw.choice(
        [len(valid)] * 4 + [header, header // 2, len(valid) - 1, len(valid) + 7, draw.randrange(len(valid) + 1)]
    )
    return bytes(broken[:length]) + bytes(max(0, length - len(broken)))
