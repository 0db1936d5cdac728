"""Block scales are finite exactly when the decoded values are: every type, random bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmquant.convert.gguf.finite import check_stored
from mmquant.errors import InputError
from mmquant.quantize.ggml.codec import decode
from mmquant.quantize.ggml.types import GGMLType


def refused(data: np.ndarray, kind: GGMLType) -> bool:
    try:
        check_stored(data, kind, "m.gguf: x")
    except InputError:
        return True
    return False


@pytest.mark.parametrize("kind", list(GGMLType), ids=lambda kind: kind.name)
def test_refused_exactly_when_decoding_is_not_finite(kind: GGMLType) -> None:
    generator, columns, outcomes = np.random.default_rng(kind), 256, set()
    for _ in range(400):
        data = generator.integers(0, 256, (1, kind.row_bytes(columns)), np.uint8)
        if kind in (GGMLType.F32, GGMLType.BF16, GGMLType.F16):
            data &= 0xBB  # else every row of 256 values would hold one
            if generator.random() < 0.5:
                data[0, -2:] |= 0x7C if kind is GGMLType.F16 else 0xFF
        elif kind is GGMLType.MXFP4:
            data[0, ::17] = generator.integers(0, 253, 8)
            data[0, 17] = generator.choice([7, 255])
        elif kind.block_columns == 32:
            data[0, generator.integers(0, 2) :: 1] &= 0xBF
            if generator.random() < 0.3:
                data[0, : kind.block_bytes] |= 0x7C
        elif generator.random() < 0.2:
            data |= 0x7C
        expected = not bool(torch.isfinite(decode(torch.from_numpy(data), kind, columns)).all())
        assert refused(data, kind) == expected
        outcomes.add(expected)
    assert outcomes == {True, False}


@pytest.mark.parametrize("kind", [GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F32, GGMLType.IQ1_M])
def test_a_late_block_is_seen(monkeypatch: pytest.MonkeyPatch, kind: GGMLType) -> None:
    monkeypatch.setattr("mmquant.convert.gguf.finite.AT_ONCE", 3)
    data = np.zeros((1024, kind.block_bytes), np.uint8)
    assert not refused(data, kind)
    data[-1] = 0xFF
    with pytest.raises(InputError, match=r"^m\.gguf: x holds NaN or infinity as "):
        check_stored(data, kind, "m.gguf: x")
