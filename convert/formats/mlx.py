"""MLX's quantized matrices, as mlx_lm's folders hold them: modes affine, nvfp4, mxfp4 and mxfp8 (read only).

`weight` U32 [O, I * bits / 32]: each row one stream of codes, the first in the lowest bits. affine: `scales` and
`biases` [O, I / group] in the model's dtype, a weight is scale * code + bias. The others: `scales` U8 in E4M3 of 16
inputs (nvfp4), or powers of two, 2^(s - 127), of 32; codes E2M1 (mxfp8: E4M3). Experts in nvfp4 may have a
`global_scale` F32 []: scales are multiples of it over 448 * 6 then. config.json names modules that differ from its top
level; one without `scales` is not quantized. Source: mlx 0.32.4 (mx.dequantize), mlx_lm 0.32.2 (utils.py, load_model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...quantize.affine.grid import BITS, AffineGrid
from ...quantize.fp4.grid import NVFP4
from ...quantize.fp4.levels import from_nibbles, to_nibbles
from ...quantize.integer.grid import IntWeight
from ..files.parse import is_object, short
from . import mxfp4
from .format import FLOATS, Fetch, Format, Found, Method, Part, PartError, Scheme, Shape
from .nvfp4 import LARGEST, blocks_of, positive
from .scales import finite
from .skip_lists import MLX

NAME, KEY = "mlx", "quantization"
GLOBAL = "mlx-nvfp4-global"  # mode nvfp4 with a global_scale
GROUPS = (32, 64, 128)
DEFAULTS = {"group_size": 64, "bits": 4, "mode": "affine"}  # of an entry that does not say so
SIZES: dict[str, tuple[int, int]] = {"nvfp4": (4, 16), "mxfp4": (4, 32), "mxfp8": (8, 32)}  # bits, inputs of a scale


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., I] from 0 up as U32 [..., I * bits / 32]; I is a multiple of 32."""
    eight = torch.unflatten(codes.to(torch.int64), -1, (-1, 8))
    word = torch.zeros(eight.shape[:-1], dtype=torch.int64, device=codes.device)
    for place in range(8):
        word |= eight[..., place] << (bits * place)
    stream = word.unsqueeze(-1).view(torch.uint8)[..., :bits]
    return stream.flatten(-2).contiguous().view(torch.uint32)


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """The codes [..., I] of such words, as float32."""
    stream = torch.unflatten(words.contiguous().view(torch.uint8), -1, (-1, bits))
    word = stream.new_zeros(*stream.shape[:-1], 8)
    word[..., :bits] = stream
    word = word.view(torch.int64)
    codes = torch.stack([(word[..., 0] >> (bits * place)) & ((1 << bits) - 1) for place in range(8)], -1)
    return codes.flatten(-2).float()


def _words(scheme: Scheme, shape: Shape) -> tuple[Part, tuple[int, int]]:
    """The part of the codes, and the shape of the scales."""
    outputs, inputs = shape
    if inputs % scheme.group or inputs * scheme.bits % 32:
        raise InputError(f"format {scheme.format.name}: group size {scheme.group} does not divide {inputs} inputs")
    return Part("weight", (outputs, inputs * scheme.bits // 32), ("U32",)), (outputs, inputs // scheme.group)


def _affine_parts(scheme: Scheme, shape: Shape) -> list[Part]:
    words, scales = _words(scheme, shape)
    return [words, Part("scales", scales, FLOATS), Part("biases", scales, FLOATS)]


def _affine_values(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    del shape
    scales, biases = finite(fetch, "scales").unsqueeze(-1), finite(fetch, "biases").unsqueeze(-1)
    codes = torch.unflatten(unpack_codes(fetch("weight"), scheme.bits), -1, (-1, scheme.group))
    return (codes * scales + biases).flatten(-2)


def _affine_pack(names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    del names
    assert weight.biases is not None
    codes = weight.codes.to(torch.int16) + (1 << (weight.bits - 1))
    scales, biases = (part.to(torch.bfloat16).contiguous() for part in (weight.scales, weight.biases))
    return {"weight": pack_codes(codes, weight.bits), "scales": scales, "biases": biases}


def _affine_nearest(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    return _affine_pack(names, AffineGrid(scheme.bits, scheme.group).round_nearest(weights, None))


def _block_parts(scheme: Scheme, shape: Shape) -> list[Part]:
    words, scales = _words(scheme, shape)
    return [words, Part("scales", scales, ("U8",))]


def _global_parts(scheme: Scheme, shape: Shape) -> list[Part]:
    return [*_block_parts(scheme, shape), Part("global_scale", (), ("F32",))]


def _powers(fetch: Fetch) -> Tensor:
    """Scales that are powers of two [..., O, G]. PartError for the code that stands for no number."""
    stored = fetch("scales")
    if bool((stored == mxfp4.NOT_A_NUMBER).any()):
        raise PartError("scales", "is not finite")
    return mxfp4.power(stored.int() - mxfp4.BIAS)


def _eights(fetch: Fetch) -> Tensor:
    """Scales in E4M3 [..., O, G]."""
    return finite(lambda suffix: fetch(suffix).view(torch.float8_e4m3fn), "scales")


def _spread(scales: Tensor, group: int) -> Tensor:
    return scales.repeat_interleave(group, -1)


def _nibbles(fetch: Fetch, inputs: int) -> Tensor:
    return from_nibbles(fetch("weight").contiguous().view(torch.uint8), inputs) / 2


def _mxfp4_values(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    return _nibbles(fetch, shape[1]) * _spread(_powers(fetch), scheme.group)


def _mxfp8_values(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    del shape
    codes = fetch("weight").contiguous().view(torch.float8_e4m3fn).float()
    if not bool(torch.isfinite(codes).all()):
        raise PartError("weight", "is not finite")
    return codes * _spread(_powers(fetch), scheme.group)


def _nvfp4_values(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    return _nibbles(fetch, shape[1]) * _spread(_eights(fetch), scheme.group)


def _global_values(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    factor = positive(fetch, "global_scale") / LARGEST
    scales = _eights(fetch) * factor.reshape(*factor.shape, 1, 1)
    return _nibbles(fetch, shape[1]) * _spread(scales, scheme.group)


def _mxfp4_pack(names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    del names
    return {"weight": to_nibbles(weight.codes).view(torch.uint32), "scales": mxfp4.exponents_of(weight)}


def _mxfp4_nearest(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    packed = mxfp4.rounded(names, weights, scheme)
    return {"weight": packed["weight_packed"].view(torch.uint32), "scales": packed["weight_scale"]}


def _global_pack(names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    del names
    packed, scales, unit = blocks_of(weight)
    return {
        "weight": packed.view(torch.uint32),
        "scales": scales.view(torch.uint8),
        "global_scale": (unit * LARGEST).contiguous(),
    }


def _global_nearest(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    del scheme
    return _global_pack(names, NVFP4.round_nearest(weights, None))


def _entry(quantization: Mapping[str, Any], name: str) -> object:
    """What is said of a module: an object, True for the top level's, False for unquantized, None for nothing."""
    found = quantization.get(name)
    if found is None or isinstance(found, bool) or is_object(found):
        return found
    raise InputError(f"config.json: {KEY}.{short(name)} is {short(found)}, expected an object, true or false")


def _setting(said: Mapping[str, Any], key: str, expected: Sequence[object]) -> Any:  # noqa: ANN401 - one of `expected`
    value = said.get(key, DEFAULTS[key])
    if type(value) is not type(expected[0]) or value not in expected:
        raise InputError(f"config.json: {KEY}: {key} is {short(value)}, expected {' or '.join(map(str, expected))}")
    return value


def _scheme(formats: Sequence[Format], said: Mapping[str, Any]) -> Scheme:
    mode = _setting(said, "mode", ("affine", *SIZES))
    rows = [row for row in formats if row.kind == mode]
    if mode == "affine":
        return Scheme(rows[0], _setting(said, "bits", BITS), _setting(said, "group_size", GROUPS), False)
    bits, group = SIZES[mode]
    for key, only in (("bits", bits), ("group_size", group)):
        _setting({key: only, **said}, key, (only,))
    one = bool(said.get("global_scale")) and mode == "nvfp4"
    return Scheme(next(row for row in rows if (row.name == GLOBAL) == one), bits, group)


def _read(
    formats: Sequence[Format], quantization: dict[str, Any], names: tuple[str, ...], engine: str
) -> Scheme | None:
    del engine
    said = _entry(quantization, names[0])
    if said is False:
        return None
    return _scheme(formats, said if is_object(said) else quantization)


def _named(quantization: Mapping[str, Any], name: str) -> bool:
    return _entry(quantization, name) is not None


def _derive(formats: Sequence[Format], parts: Found, shape: Shape) -> Scheme | None:
    """The scheme of a module that config.json does not name, from its tensors, as mlx_lm infers it."""
    weight, scales = parts.get("weight"), parts.get("scales")
    if weight is None or scales is None or len(weight[1]) != 2 or len(scales[1]) != 2 or not scales[1][1]:
        return None
    bits, group = weight[1][1] * 32 // shape[1], shape[1] // scales[1][1]
    affine = scales[0] != "U8"
    fit = [row for row in formats if (row.kind == "affine") == affine and bits in row.bits]
    one = "global_scale" in parts
    fit = [row for row in fit if group in (row.group_sizes or ()) and (row.name == GLOBAL) == one]
    return Scheme(fit[0], bits, group, not affine) if fit else None


def _config(scheme: Scheme) -> dict[str, Any]:
    """A module's entry."""
    more = {"global_scale": True} if scheme.format.name == GLOBAL else {}
    return {"group_size": scheme.group, "bits": scheme.bits, "mode": scheme.format.kind, **more}


METHOD = Method(
    (NAME,),
    _read,
    engines=(MLX,),
    top_key=KEY,
    stacked=True,
    outside=True,
    named=_named,
    derive=_derive,
    entry=_config,
    framework=NAME,
)
COMMON: dict[str, Any] = {"manifest": NAME, "command": "mlx"}
AFFINE = Format(
    "mlx-affine",
    METHOD,
    (4, 2, 3, 5, 6, 8),
    _affine_parts,
    _affine_values,
    _affine_nearest,
    _affine_pack,
    kind="affine",
    label="MLX-{bits}bit",
    choice="affine",
    group_sizes=(64, 32, 128),
    symmetric=(False,),
    **COMMON,
)
MXFP4 = Format(
    "mlx-mxfp4",
    METHOD,
    (4,),
    _block_parts,
    _mxfp4_values,
    _mxfp4_nearest,
    _mxfp4_pack,
    kind="mxfp4",
    label="MLX-MXFP4",
    choice="mxfp4",
    group_sizes=(32,),
    **COMMON,
)
NVFP4_EXPERTS = Format(
    GLOBAL,
    METHOD,
    (4,),
    _global_parts,
    _global_values,
    _global_nearest,
    _global_pack,
    kind="nvfp4",
    label="MLX-NVFP4",
    choice="nvfp4",
    group_sizes=(16,),
    experts_only=True,
    **COMMON,
)
NVFP4_PLAIN = Format(
    "mlx-nvfp4", METHOD, (4,), _block_parts, _nvfp4_values, kind="nvfp4", manifest=NAME, group_sizes=(16,)
)
MXFP8 = Format("mlx-mxfp8", METHOD, (8,), _block_parts, _mxfp8_values, kind="mxfp8", manifest=NAME, group_sizes=(32,))
FORMATS = (AFFINE, MXFP4, NVFP4_EXPERTS, NVFP4_PLAIN, MXFP8)
