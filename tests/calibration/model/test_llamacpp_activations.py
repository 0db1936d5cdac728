"""Activations equal ggml's rounding bit by bit, at every matrix of the forward."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import ggml_lib
from helpers.tiny import write_tiny
from mmquant.calibration.model.forward import KEY, QUERY, VALUE, embed, final_logits, layer_forward
from mmquant.calibration.model.llamacpp_activations import (
    as_converted,
    brain,
    change_of,
    half,
    head_rounding,
    layer_rounding,
    q8_0,
    q8_k,
)
from mmquant.convert.open import open_native
from mmquant.convert.source import read_globals, read_layer
from mmquant.quantize.ggml.types import GGMLType

Q8_1, Q8_K = 9, 15  # types of activations only
CHANGES = {0: None, 1: half, 8: q8_0, Q8_1: q8_0, Q8_K: q8_k, 30: brain}


class Traits(ctypes.Structure):
    """ggml_type_traits_cpu of ggml-cpu.h."""

    _fields_ = [
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


@pytest.mark.parametrize("kind", GGMLType, ids=lambda kind: kind.name)
def test_every_type_is_multiplied_by_what_ggml_multiplies_it_by(kind: GGMLType) -> None:
    ggml_lib.need()
    function = ggml_lib.load_library().ggml_get_type_traits_cpu
    function.restype, function.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]
    assert change_of(kind.name) is CHANGES[function(int(kind)).contents.vec_dot_type]


@pytest.mark.parametrize(("name", "change", "block"), [("q8_0", q8_0, 32), ("q8_K", q8_k, 256)])
@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(1, 5), scale=st.sampled_from([1e-6, 0.3, 1.0, 3e4]))
@settings(max_examples=30, deadline=None)
def test_eight_bits_are_ggmls(name: str, change: object, block: int, seed: int, blocks: int, scale: float) -> None:
    ggml_lib.need()
    x = torch.randn(blocks * block, generator=torch.Generator().manual_seed(seed)) * scale
    x[: block // 2] = 0 if seed % 3 == 0 else x[: block // 2]
    if seed % 5 == 0:
        x[:block] = 0
    found, wanted = change(x), ggml_lib.ggml_rounds(name, x, block)  # type: ignore[operator]
    step = wanted.unflatten(0, (-1, block)).abs().amax(1, keepdim=True).expand(-1, block).flatten() / 127
    # ggml divides by the scale, or multiplies by its inverse: a value half-way between two codes may go either way.
    apart = (found - wanted).abs() > 1e-6 * wanted.abs()
    assert apart.float().mean() <= 0.02
    assert bool(((found - wanted).abs() <= 1.01 * step).all())


def test_largest_values_of_either_sign_keep_their_place() -> None:
    for sign in (1.0, -1.0):
        x = torch.zeros(256)
        x[7], x[9] = sign * 2.0, -sign * 2.0 * 126 / 127
        torch.testing.assert_close(q8_k(x), x, rtol=1e-6, atol=0)
    for change in (q8_0, q8_k):
        assert change(torch.zeros(2, 256)).abs().max() == 0


def test_every_matrix_sees_rounded_inputs(tmp_path: Path) -> None:
    """Leaving any single one out gives other logits; nothing else is touched."""
    write_tiny(tmp_path)
    source = open_native(tmp_path)
    g, outside = source.geometry, read_globals(source)
    weights = as_converted(source, read_layer(source, 0))
    assert torch.equal(weights.down, read_layer(source, 0).down.to(torch.bfloat16).float())
    assert torch.equal(weights.router, read_layer(source, 0).router)
    hidden = embed(outside, torch.arange(24).view(2, 12))
    rounding, head = layer_rounding(source, 0), head_rounding(source)
    assert set(rounding) == {"q", "k", "v", "o", "gate", "up", "down", QUERY, KEY, VALUE}

    def outcome(layer: dict, last: dict) -> Tensor:
        return final_logits(outside, g, layer_forward(weights, g, hidden, None, layer), last)

    whole = outcome(dict(rounding), dict(head))
    for name in rounding:
        assert not torch.equal(whole, outcome({k: v for k, v in rounding.items() if k != name}, dict(head))), name
    assert not torch.equal(whole, outcome(dict(rounding), {}))
    assert torch.equal(outcome({}, {}), final_logits(outside, g, layer_forward(weights, g, hidden)))
