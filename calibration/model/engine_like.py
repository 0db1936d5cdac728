"""Compute a layer as an engine does: profiles say which inputs it rounds for which format, and how it keeps its cache.

What a profile does is one row of data, `PROFILES`; what an artifact stores decides which column applies (`inputs_of`).
Values between the products are bfloat16 in vLLM, matrices of weights-only formats are multiplied as bfloat16 (Marlin).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...convert.checkpoints.quantization_config import quantization_of
from ...convert.formats import skip_lists
from ...convert.formats.format import Scheme
from ...convert.formats.table import METHODS
from ...convert.gguf.names import TOKEN_EMBD
from ...convert.models.layer import LayerWeights
from ...convert.models.names import ATTENTION, PROJECTIONS
from ...convert.source import Source, scale_beside, scheme_of
from ...quantize.fp8 import dequantize_tiles, quantize_tiles
from .forward import KEY, MASS, QUERY, STEP, VALUE, Change, Rounding
from .llamacpp_activations import as_converted, head_rounding, layer_rounding
from .roundings import brain, fp8_groups, fp8_mass, fp8_static, fp8_token, nvfp4, power_above

LLAMA, VLLM = "llama.cpp", "vllm"
SIXTEEN, FOUR = "16 bit", "FP4"
TOKEN, BLOCK, POWERS = "FP8 a token", "FP8 1x128", "FP8 1x128, scales powers of two"


@dataclass(frozen=True)
class Profile:
    """What an engine does on some hardware: how the inputs of each sort of matrix are rounded, by the words above.

    block     FP8 weights in tiles: of attention, of experts
    channel   FP8 weights with a scale for each output
    four      FP4 weights that come with scales of FP4 inputs
    caches    the caches that it has, the first by default
    query     whether an FP8 cache's queries and probabilities are FP8 as well
    source    where this is known from
    """

    name: str
    engine: str
    block: tuple[str, str] = (SIXTEEN, SIXTEEN)
    channel: str = SIXTEEN
    four: str = SIXTEEN
    caches: tuple[str, ...] = ("16bit", "fp8")
    query: bool = False
    source: str = ""


PROFILES: dict[str, Profile] = {
    row.name: row
    for row in (
        Profile(
            "vllm-h100",
            VLLM,
            block=(BLOCK, BLOCK),
            channel=TOKEN,
            query=True,
            source="vLLM 0.26 on one H200, compared with (docs/eval.md): CUTLASS W8A8, Triton MoE, FlashAttention 3",
        ),
        Profile(
            "vllm-h100-deepgemm",
            VLLM,
            block=(POWERS, BLOCK),
            channel=TOKEN,
            query=True,
            source="the same with DeepGEMM (VLLM_USE_DEEP_GEMM_E8M0): attention under scales that are powers of two",
        ),
        Profile(
            "vllm-a100",
            VLLM,
            source="vLLM 0.33's source: below SM89 FP8 and FP4 are weights only (Marlin), the cache is read as BF16",
        ),
        Profile(
            "vllm-b200",
            VLLM,
            block=(POWERS, POWERS),
            channel=TOKEN,
            four=FOUR,
            query=True,
            source="vLLM 0.33's source: FP4 products, FP8 tiles under powers of two; not run on such a card",
        ),
        Profile(
            "llama.cpp",
            LLAMA,
            caches=("16bit", "q8_0", "q4_0"),
            source="ggml-cpu.c, llama-kv-cache.cpp: its CPU backend, compared with (docs/eval.md)",
        ),
    )
}


@dataclass(frozen=True)
class Like:
    """A profile applied to artifacts; `cache`: one of its caches, None: what the artifact asks for, else 16 bits."""

    profile: Profile
    cache: str | None = None

    @property
    def name(self) -> str:
        """The profile's name, with the cache where one was asked for."""
        return self.profile.name if self.cache is None else f"{self.profile.name} {self.cache}"

    def opens(self, source: Source) -> bool:
        """Whether the engine takes such an artifact: llama.cpp takes GGUF files, vLLM its own formats."""
        if source.ggml_type(TOKEN_EMBD) is not None:
            return self.profile.engine == LLAMA
        method = METHODS.get(str((quantization_of(source.config) or {}).get("quant_method")))
        return self.profile.engine == VLLM and (method is None or skip_lists.VLLM in method.engines)

    def same_as(self, source: Source) -> tuple[str, ...]:
        """Equal for profiles that compute this artifact alike, whatever hardware they stand for."""
        said = self.describe(source)
        return self.profile.engine, *said.values(), str(self.profile.query and said["cache"] == "fp8")

    def cache_of(self, source: Source) -> str:
        """The cache under which the artifact runs."""
        if self.cache is not None:
            return self.cache
        asked = (quantization_of(source.config) or {}).get("kv_cache_scheme") if self.profile.engine == VLLM else None
        return "fp8" if asked else self.profile.caches[0]

    def weights(self, source: Source, layer: int, weights: LayerWeights) -> LayerWeights:
        """The matrices as the engine multiplies them."""
        if self.profile.engine == LLAMA:
            return as_converted(source, weights)
        schemes = _schemes(source, layer)
        changes = {role: self._weight_change(scheme, role in ATTENTION_ROLES) for role, scheme in schemes.items()}
        return replace(weights, **{role: change(getattr(weights, role)) for role, change in changes.items() if change})

    def _weight_change(self, scheme: Scheme | None, dense: bool) -> Callable[[Tensor], Tensor] | None:
        if scheme is None:
            return None
        if inputs_of(self.profile, scheme, dense) == POWERS:
            return _in_tiles_of_powers(scheme.block or (128, 128))
        return brain if inputs_of(self.profile, scheme, dense) == SIXTEEN else None

    def layer(self, source: Source, layer: int) -> Rounding:
        """What happens to the inputs of each matrix, to the cache and to what attention multiplies with it."""
        cache = self.cache_of(source)
        if self.profile.engine == LLAMA:
            return layer_rounding(source, layer, cache)
        found: dict[str, Change] = {STEP: brain}
        for role, scheme in _schemes(source, layer).items():
            change = self._input_change(source, layer, role, scheme)
            found |= {} if change is None else {role: change}
        return found | self._cache_change(source, layer, cache)

    def _input_change(self, source: Source, layer: int, role: str, scheme: Scheme | None) -> Change | None:
        kind = inputs_of(self.profile, scheme, role in ATTENTION_ROLES)
        if kind == FOUR:
            return nvfp4(_divisor(source, layer, role))
        size = scheme.block[1] if scheme is not None and scheme.block is not None else 128
        changes = {
            SIXTEEN: None,
            TOKEN: fp8_token,
            BLOCK: lambda x: fp8_groups(x, False, size),
            POWERS: lambda x: fp8_groups(x, True, size),
        }
        return changes[kind]

    def _cache_change(self, source: Source, layer: int, cache: str) -> dict[str, Change]:
        if cache == "16bit":
            return {}
        keys, values = (_cache_scale(source, layer, name) for name in ("k", "v"))
        stored: dict[str, Change] = {KEY: fp8_static(keys), VALUE: fp8_static(values)}
        if self.profile.query:
            return {**stored, QUERY: fp8_static(1.0), MASS: fp8_mass}
        return {name: _then_brain(change) for name, change in stored.items()}

    def head(self, source: Source) -> Rounding:
        """What happens to the head's input and to the logits."""
        return head_rounding(source) if self.profile.engine == LLAMA else {STEP: brain}

    def describe(self, source: Source) -> dict[str, str]:
        """What is rounded how, in words, of attention, experts and cache."""
        if self.profile.engine == LLAMA:
            inputs = "as ggml pairs each type with"
            return {"attention": inputs, "experts": inputs, "cache": self.cache_of(source)}
        schemes = _schemes(source, 0)
        parts = {"attention": ("q", True), "experts": ("gate", False)}
        found = {part: inputs_of(self.profile, schemes[role], dense) for part, (role, dense) in parts.items()}
        return {**found, "cache": self.cache_of(source)}


ATTENTION_ROLES = tuple(name[0] for name in ATTENTION)


def inputs_of(profile: Profile, scheme: Scheme | None, dense: bool) -> str:
    """How the inputs of a matrix stored so are rounded; dense: of attention, else of experts."""
    if scheme is None:
        return SIXTEEN
    if scheme.activations == 4:
        return profile.four
    if not scheme.format.requantizable:
        return SIXTEEN
    return profile.channel if scheme.block is None else profile.block[0 if dense else 1]


def like_of(name: str, cache: str | None = None) -> Like:
    """The profile of this name. InputError for one that there is not, and for a cache that it does not have."""
    if name not in PROFILES:
        raise InputError(f"--engine-like {name}: expected exact or one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    if cache is not None and cache not in profile.caches:
        raise InputError(f"--cache {cache}: {name} has none, expected {' or '.join(profile.caches)}")
    return Like(profile, cache)


def _schemes(source: Source, layer: int) -> dict[str, Scheme | None]:
    """How each sort of matrix of a layer is stored: engines take the first expert's word for all."""
    names = source.geometry.names
    found = {name[0]: scheme_of(source, names.attention(layer, name)) for name in ATTENTION}
    return found | {name: scheme_of(source, names.expert(layer, 0, name)) for name in PROJECTIONS}


def _divisor(source: Source, layer: int, role: str) -> float:
    """The divisor of FP4 inputs: the least of a layer's experts, as kernels with one scale for all take it."""
    names, experts = source.geometry.names, range(source.geometry.experts)
    if role in ATTENTION_ROLES:
        stems = [names.attention(layer, next(name for name in ATTENTION if name[0] == role))]
    else:
        stems = [names.expert(layer, expert, role) for expert in experts]
    found: list[float] = []
    for stem in stems:
        divisor, scale = (scale_beside(source, f"{stem}.{suffix}") for suffix in ("input_global_scale", "input_scale"))
        if divisor is None and scale is None:
            raise InputError(f"{source.label}: {stem} has no scale of its FP4 inputs, expected input_global_scale")
        found.append(float(divisor) if divisor is not None else 1.0 / float(scale))  # type: ignore[arg-type]
    return min(found)


def _cache_scale(source: Source, layer: int, letter: str) -> float:
    """The scale of keys or values that the artifact stores, else 1."""
    names = source.geometry.names
    scale = scale_beside(source, f"{names.attention(layer, f'{letter}_proj')}.{letter}_scale")
    return 1.0 if scale is None else float(scale)


def _then_brain(change: Change) -> Change:
    return lambda x: brain(change(x))


def _in_tiles_of_powers(tile: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Codes and scales made anew: DeepGEMM's tiles [..., O, I] under powers of two."""

    def change(weight: Tensor) -> Tensor:
        each = [quantize_tiles(part, tile, power_above) for part in weight.reshape(-1, *weight.shape[-2:])]
        values = torch.stack([dequantize_tiles(codes, scales, tile) for codes, scales in each])
        return values.view(weight.shape).to(weight.dtype)

    return change
