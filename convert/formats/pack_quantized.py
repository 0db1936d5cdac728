"""compressed-tensors pack-quantized: 4- or 8-bit integers in words along the inputs, bfloat16 scales per group.

`weight_packed` I32 [O, I*bits/32], `weight_scale` [O, G], `weight_shape`, and asymmetric `weight_zero_point` packed
along the outputs [O*bits/32, G]; with one scale for the matrix it is not packed. Read as well: 1 to 8 bits (until
compressed-tensors 0.18 a word held whole codes, from 0.19 on they follow each other), and inputs in the groups that
`weight_g_idx` names (written until 0.18).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...quantize.integer.grid import IntWeight
from ...quantize.integer.pack import pack_rows, pack_zeros_ct, unpack_rows, unpack_zeros_ct, words_of
from ...quantize.integer.rtn import rtn_int
from . import compressed_tensors as ct
from .format import FLOATS, Fetch, Format, Part, Scheme, Shape
from .scales import ZEROS, finite, g_idx, grouped, groups_of

NAME = "pack-quantized"


def _parts(scheme: Scheme, shape: Shape) -> list[Part]:
    (outputs, inputs), groups = shape, groups_of(scheme, shape[1])
    parts = [
        Part("weight_packed", (outputs, words_of(inputs, scheme.bits, scheme.dense)), ("I32",)),
        Part("weight_scale", (outputs, groups), FLOATS, single=scheme.group == -1),
        Part("weight_shape", (2,), ("I64",), needed=False),
    ]
    if scheme.whole and not scheme.symmetric:
        parts.append(Part("weight_zero_point", (1, 1), ZEROS, single=True))
    elif not scheme.symmetric:
        parts.append(Part("weight_zero_point", (words_of(outputs, scheme.bits, scheme.dense), groups), ("I32",)))
    return [*parts, *g_idx(scheme, shape)]


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    codes, zeros = unpack_rows(fetch("weight_packed"), scheme.bits, shape[1], scheme.dense), None
    if scheme.whole and not scheme.symmetric:
        zeros = finite(fetch, "weight_zero_point")
    elif not scheme.symmetric:
        zeros = unpack_zeros_ct(fetch("weight_zero_point"), scheme.bits, shape[0], scheme.dense)
    return grouped(codes, finite(fetch, "weight_scale"), zeros, scheme, fetch)


def _otherwise(scheme: Scheme) -> Scheme | None:
    return dataclasses.replace(scheme, dense=False) if scheme.dense and 32 % scheme.bits else None


def _pack(names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    del names
    tensors = {
        "weight_packed": pack_rows(weight.codes, weight.bits),
        "weight_scale": weight.scales.to(torch.bfloat16),
        "weight_shape": torch.tensor(weight.codes.shape[1:], dtype=torch.int64).expand(len(weight.codes), -1),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = pack_zeros_ct(weight.zeros, weight.bits)
    return tensors


def _nearest(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    return _pack(names, rtn_int(weights, scheme.bits, scheme.group, scheme.symmetric))


def _group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    strategy, size = ("channel", None) if scheme.group == -1 else ("group", scheme.group)
    zero = {} if scheme.symmetric else {"symmetric": False, "zp_dtype": "torch.int8"}
    return ct.group(NAME, targets, ct.arguments(scheme.bits, "int", strategy, group_size=size, **zero))


FORMAT = Format(
    NAME,
    ct.METHOD,
    (4, 8),
    _parts,
    _unpack,
    _nearest,
    _pack,
    _group,
    ct.one_group,
    label="W{bits}A16",
    manifest=ct.NAME,
    command="int4",
    choice="compressed-tensors",
    symmetric=(True, False),
    beside=("weight_g_idx",),
    more_bits=(1, 2, 3, 5, 6, 7),
    otherwise=_otherwise,
)
