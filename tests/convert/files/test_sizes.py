"""Sizes as users write them."""

from __future__ import annotations

import pytest

from mmquant.convert.files.sizes import parse_size
from mmquant.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("98GB", 98 * 10**9),
        ("98GiB", 98 * 2**30),
        ("98e9", 98 * 10**9),
        ("98", 98),
        (" 1.5 kb ", 1500),
        ("0.1MB", 100_000),
        ("5G", 5 * 10**9),
        ("5Gi", 5 * 2**30),
        ("7b", 7),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *"-1GB +1GB inf infGB nan 0 0.1 1e99 9e9TB 9223372036854775808".split(),
        *"1iB 5PB 0x10 1_000 \u0663GB 5e 1e-3 5GBB five".split(),
        "",
        "5 GB 1",
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="expected"):
        parse_size(text)
