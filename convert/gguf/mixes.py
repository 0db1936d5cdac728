"""Stock mixes of llama.cpp by name: the type that llama-quantize gives each minimax-m2 tensor.

Source of the rules: llama.cpp src/llama-quant.cpp (llama_tensor_get_type and its fallback), stated here as tables per
tensor role. The tests hold the tables that llama.cpp's own dry run prints for the shapes of M2.7 and of the demo.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from mmquant.errors import InputError, suggest

from ...quantize.ggml.types import GGMLType, storable
from ..models.geometry import Geometry
from .names import OUTPUT, TOKEN_EMBD, all_shapes, is_quantizable, split_block

PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Mix:
    """A `--type`: what general.file_type says, and the type of every tensor that has no rule of its own."""

    name: str
    file_type: int
    base: str


_MIXES = (
    ("F32", 0, "F32"), ("F16", 1, "F16"), ("BF16", 32, "BF16"), ("Q4_0", 2, "Q4_0"), ("Q4_1", 3, "Q4_1"),
    ("Q8_0", 7, "Q8_0"), ("Q5_0", 8, "Q5_0"), ("Q5_1", 9, "Q5_1"), ("Q2_K", 10, "Q2_K"), ("Q2_K_S", 21, "Q2_K"),
    ("Q3_K_S", 11, "Q3_K"), ("Q3_K_M", 12, "Q3_K"), ("Q3_K_L", 13, "Q3_K"), ("Q4_K_S", 14, "Q4_K"),
    ("Q4_K_M", 15, "Q4_K"), ("Q5_K_S", 16, "Q5_K"), ("Q5_K_M", 17, "Q5_K"), ("Q6_K", 18, "Q6_K"),
    ("IQ2_XXS", 19, "IQ2_XXS"), ("IQ2_XS", 20, "IQ2_XS"), ("IQ2_S", 28, "IQ2_XS"), ("IQ2_M", 29, "IQ2_S"),
    ("IQ3_XS", 22, "IQ3_S"), ("IQ3_XXS", 23, "IQ3_XXS"), ("IQ3_S", 26, "IQ3_S"), ("IQ3_M", 27, "IQ3_S"),
    ("IQ1_S", 24, "IQ1_S"), ("IQ1_M", 31, "IQ1_M"), ("IQ4_NL", 25, "IQ4_NL"), ("IQ4_XS", 30, "IQ4_XS"),
    ("MXFP4_MOE", 38, "MXFP4"),
)  # fmt: skip
MIXES = {name: Mix(name, file_type, base) for name, file_type, base in _MIXES}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
LOW = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")  # one branch of their own in llama-quantize

OUTPUT_TYPE = {"IQ3_XXS": "Q5_K", **dict.fromkeys(LOW, "Q5_K"), "MXFP4_MOE": "Q8_0", "Q8_0": "Q8_0"}  # others Q6_K
EMBED_TYPE = {
    "IQ2_XXS": "Q2_K", "IQ2_XS": "Q2_K", "IQ1_S": "Q2_K", "IQ1_M": "Q2_K",
    "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S", "IQ3_XXS": "IQ3_S",
}  # fmt: skip
QUERY_KEY_TYPE = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}
ATTENTION_OUTPUT_TYPE = {
    "Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K",
    "IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S",
}  # fmt: skip
VALUE_WIDE = {  # attn_v when 4 or more query heads share it
    "Q2_K": "Q4_K", "Q2_K_S": "Q4_K", "IQ3_XXS": "Q4_K", "IQ3_XS": "Q4_K", "IQ3_S": "Q4_K", "IQ4_NL": "Q5_K",
    "IQ4_XS": "Q5_K",
}  # fmt: skip
VALUE_ALWAYS = {"IQ3_M": "Q4_K", "Q3_K_L": "Q5_K"}
DOWN_ALWAYS = {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}
DOWN_FIRST_EIGHTH = {"Q2_K_S": "Q4_K", "IQ3_M": "Q4_K", "Q4_K_S": "Q5_K"}
DOWN_FIRST_LOW = {"IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}  # the others of LOW: Q2_K


def find_mix(name: str) -> Mix:
    """The mix of a `--type`, upper or lower case. Raises ValueError that lists the names."""
    key = name.upper()
    key = ALIASES.get(key, key)
    if key not in MIXES:
        raise InputError(f"--type {name}: unknown, {suggest(key, MIXES)}")
    return MIXES[key]


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's "use more bits" layers: the first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _value(mix: Mix, layer: int, g: Geometry, importance: bool) -> str:
    wide = g.heads // g.kv_heads >= 4
    if mix.name in LOW:
        if wide or g.experts >= 4:
            return "Q4_K"
        return "IQ3_S" if mix.name in DOWN_FIRST_LOW else "Q2_K"
    if g.experts == 8:
        return "Q8_0"
    if wide and mix.name in VALUE_WIDE:
        return VALUE_WIDE[mix.name]
    narrow = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_XXS" if importance else "IQ3_S", **VALUE_ALWAYS}
    if mix.name in narrow:
        return narrow[mix.name]
    if mix.name == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if mix.name in ("Q4_K_M", "Q5_K_M") and more_bits(layer, g.layers):
        return "Q6_K"
    return "Q5_K" if mix.name == "Q4_K_S" and layer < 4 else mix.base


def _down(mix: Mix, layer: int, g: Geometry, importance: bool) -> str:
    first_eighth = layer < g.layers // 8
    if mix.name in LOW:
        return DOWN_FIRST_LOW.get(mix.name, "Q2_K") if first_eighth else mix.base
    if mix.name in DOWN_ALWAYS:
        return DOWN_ALWAYS[mix.name]
    if mix.name == "Q3_K_M":
        return "Q5_K" if layer < g.layers // 16 else "Q4_K"
    if mix.name in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more_bits(layer, g.layers) else mix.base
    if mix.name == "IQ3_XXS" and not importance:
        return "Q4_K" if first_eighth else "Q3_K"
    if mix.name == "IQ3_M" and g.experts == 8 and more_bits(layer, g.layers):
        return "Q4_K"
    return _down_first(mix, importance) if first_eighth else mix.base


def _down_first(mix: Mix, importance: bool) -> str:
    """Down projections of the first eighth of the layers, where an importance matrix matters to llama-quantize."""
    if mix.name in ("IQ4_NL", "IQ4_XS"):
        return mix.base if importance else "Q5_K"
    if mix.name in ("Q4_0", "Q5_0"):
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[mix.name] if importance else mix.base
    return DOWN_FIRST_EIGHTH.get(mix.name, mix.base)


def _attention_output(mix: Mix, layer: int, g: Geometry, importance: bool) -> str:
    if g.experts == 8:
        kept = (
            ("IQ3_M",)
            if mix.name in LOW
            else ("Q2_K_S", "Q3_K_L", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")
        )
        return mix.base if mix.name in kept else "Q5_K"
    return ATTENTION_OUTPUT_TYPE.get(mix.name, mix.base)


def _query_key(mix: Mix, layer: int, g: Geometry, importance: bool) -> str:
    return QUERY_KEY_TYPE.get(mix.name, mix.base)


def _key(mix: Mix, layer: int, g: Geometry, importance: bool) -> str:
    if g.experts == 8:
        return "Q4_K" if mix.name in LOW else "Q8_0"
    return _query_key(mix, layer, g, importance)


def _gate_up(mix: Mix, layer: int, g: Geometry, importance: bool) -> str:
    middle = g.layers // 8 <= layer < 7 * g.layers // 8
    return "IQ3_XXS" if mix.name == "IQ3_XS" and middle else mix.base


_RULES: dict[str, Callable[[Mix, int, Geometry, bool], str]] = {
    "attn_q.weight": _query_key,
    "attn_k.weight": _key,
    "attn_v.weight": _value,
    "attn_output.weight": _attention_output,
    "ffn_gate_exps.weight": _gate_up,
    "ffn_up_exps.weight": _gate_up,
    "ffn_down_exps.weight": _down,
}


def _stock(mix: Mix, name: str, g: Geometry, importance: bool) -> str:
    if mix.base in PLAIN:
        return mix.base
    if name == OUTPUT:
        return "Q8_0" if not GGMLType[mix.base].fits(g.hidden) else OUTPUT_TYPE.get(mix.name, "Q6_K")
    layer, rest = split_block(name)
    if mix.name == "MXFP4_MOE":
        return "MXFP4" if rest.endswith("_exps.weight") else "Q8_0"
    if name == TOKEN_EMBD:
        return EMBED_TYPE.get(mix.name, mix.base)
    assert layer is not None, name
    return _RULES[rest](mix, layer, g, importance)


def fitting(kind: str, columns: int) -> str:
    """The type that llama-quantize falls back to when `columns` is not a multiple of the type's block."""
    return storable(GGMLType[kind], columns).name


def parse_overrides(items: tuple[str, ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    """`--tensor-type REGEX=TYPE`, searched in the lower-cased name; the first match wins, as in llama-quantize."""
    found: list[tuple[re.Pattern[str], str]] = []
    for item in items:
        pattern, separator, kind = item.rpartition("=")
        if not separator or not pattern or kind.upper() not in GGMLType.__members__:
            near = suggest(kind.upper(), GGMLType.__members__)
            raise InputError(f"--tensor-type {item}: expected REGEX=TYPE; {near}")
        try:
            found.append((re.compile(pattern.lower()), kind.upper()))
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"--tensor-type {item}: not a regular expression ({error})") from None
    return tuple(found)


def tensor_types(
    mix: Mix,
    geometry: Geometry,
    *,
    importance: bool = True,
    overrides: tuple[tuple[re.Pattern[str], str], ...] = (),
    plan: dict[str, str] | None = None,
) -> dict[str, str]:
    """GGUF name -> type of every tensor, in writing order.

    The plan counts first, then overrides, then the stock rule; shapes may force a fallback. Raises InputError for a
    name in `plan` that the model does not have, and for an override that names no tensor.
    """
    shapes = all_shapes(geometry)
    for pattern, kind in overrides:
        if not any(pattern.search(name) and is_quantizable(name, shape) for name, shape in shapes.items()):
            raise InputError(f"--tensor-type {pattern.pattern}={kind}: no tensor that can be quantized has such a name")
    for name, kind in (plan or {}).items():
        if name not in shapes or not is_quantizable(name, shapes[name]) or kind not in GGMLType.__members__:
            raise InputError(
                f"plan: {name} = {kind}, expected a quantizable tensor of this model and a type of llama.cpp"
            )
    types: dict[str, str] = {}
    for name, shape in shapes.items():
        if not is_quantizable(name, shape):
            types[name] = "F32"
            continue
        kind = (plan or {}).get(name) or next((kind for pattern, kind in overrides if pattern.search(name)), None)
        types[name] = fitting(kind or _stock(mix, name, geometry, importance), shape[-1])
    return types


def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; the last dimension must be a multiple of the type's block (ValueError)."""
    return math.prod(shape[:-1]) * GGMLType[kind].row_bytes(shape[-1])


def data_bytes(geometry: Geometry, types: dict[str, str]) -> int:
    """Bytes of all tensors of a file, without headers and padding; types: of those that can be quantized."""
    shapes = all_shapes(geometry)
    chosen = {name: kind for name, kind in types.items() if name not in shapes or is_quantizable(name, shapes[name])}
    known = tensor_types(MIXES["F32"], geometry, plan=chosen)
    return sum(tensor_bytes(known[name], shape) for name, shape in shapes.items())
