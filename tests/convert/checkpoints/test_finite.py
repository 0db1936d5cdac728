"""NaN and infinity found by bits agree with torch's own conversion."""

from __future__ import annotations

import pytest
import torch

from mmquant.convert.checkpoints import finite
from mmquant.convert.checkpoints.finite import check_finite, first_bad
from mmquant.errors import InputError

EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]


@pytest.mark.parametrize("dtype", [*EIGHT, torch.float16, torch.bfloat16], ids=str)
def test_every_pattern_of_a_narrow_type(dtype: torch.dtype) -> None:
    if dtype.itemsize == 1:
        values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    else:
        values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    expected = ~torch.isfinite(values.float())
    assert torch.equal(finite._bad(values), expected)
    good = values[~expected] if dtype.itemsize > 1 else values.view(torch.uint8)[~expected].view(dtype)
    assert first_bad(good) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at_once", [1, 7, 1 << 24])
def test_the_first_bad_value_is_named(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bad: float, at_once: int
) -> None:
    monkeypatch.setitem(finite.AT_ONCE, "cpu", at_once)
    values = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[0, 0, 0] = torch.finfo(dtype).max
    values[0, 0, 1] = -torch.finfo(dtype).tiny
    check_finite(values, "x")
    values[2, 1, 3] = values[2, 4, 0] = bad
    with pytest.raises(InputError, match=r"^a: b.weight holds NaN or infinity, first at \[2, 1, 3\]"):
        check_finite(values, "a: b.weight")
    check_finite(values.transpose(0, 2)[1:3], "a view without it")


def test_integers_and_nothing_are_finite() -> None:
    for value in (torch.full((3,), 0x7F, dtype=torch.uint8), torch.zeros(0), torch.zeros(2, 0)):
        check_finite(value, "x")
