"""Folders of experts in few bits by round to nearest; attention in bfloat16, FP8 or as the experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError

from ..checkpoints.checkpoint import Checkpoint
from ..formats import compressed_tensors as ct
from ..formats.format import Format, Scheme, check_writable
from ..formats.spec import TensorSpec
from ..formats.table import choices
from ..models.geometry import Geometry
from ..models.names import ATTENTION, ATTENTION_STACKS, EXPERT_STACKS, PROJECTIONS
from ..models.shapes import matrix_shapes, plain_shapes
from .fp8 import fp8_scheme
from .kinds import Kind
from .layer_words import ATTENTION_PART, EXPERTS_PART, layers_in_words, layers_target
from .packing import folder_config, stacked_tensors
from .schemes import carried_tensors, on_grid, scheme_specs, stacks
from .variant import plain_specs, plain_tensors

GROUP_SIZES = (32, 64, 128)
ATTENTION_FP8 = {"fp8": "block", "fp8-channel": "channel"}  # of attention -> the format that `mmquant fp8` calls so


def check_groups(
    g: Geometry, group_size: int, parallel: int = 1, attention: str = "bf16", sizes: tuple[int, ...] = GROUP_SIZES
) -> None:
    """InputError when a group does not divide the inputs of a matrix, whole or split over `parallel` devices.

    Tensor parallelism splits the inputs of down (and of o, where attention is stored as the experts); a group must not
    straddle two devices (vLLM refuses to load). sizes: those that the user can choose.
    """
    width = g.expert_width // parallel
    if g.expert_width % parallel:
        raise InputError(f"expert width {g.expert_width} is not a multiple of {parallel} devices")
    if group_size == -1:
        return
    works = ", ".join(str(s) for s in sizes if not g.hidden % s and not width % s) or "none"
    if g.hidden % group_size or g.expert_width % group_size:
        others = f"; sizes that do: {works}" if len(sizes) > 1 else ""
        where = f"hidden {g.hidden} and expert width {g.expert_width}"
        raise InputError(f"group size {group_size} does not divide {where}{others}")
    if width % group_size:
        most = max(p for p in range(1, parallel) if not g.expert_width % (p * group_size))
        ways = f"group sizes {works}, " if len(sizes) > 1 else ""
        raise InputError(
            f"group size {group_size}: {g.expert_width}/{parallel} = {width} is not a multiple of it; what works: "
            f"{ways}at most {most} devices, or expert parallelism (--enable-expert-parallel)"
        )

    inputs = g.heads * g.head_dim
    if attention not in ("bf16", *ATTENTION_FP8) and inputs % (parallel * group_size):
        over = f"o's {inputs} inputs over {parallel} devices"
        raise InputError(f"attention {attention}: group size {group_size} does not divide {over}")


@dataclass(frozen=True)
class WeightsVariant:
    """Round to nearest with the best scales for the weights alone; needs no calibration.

    command      whose formats it writes; also the word for attention that is stored as the experts
    title        what its label begins with
    eight_bit    layers whose experts keep 8 bits (compressed-tensors)
    kv_cache     or fp8: calibrated scales of an FP8 cache (compressed-tensors)
    activations  4: calibrated scales of FP4 activations
    kinds        of a plan: how each layer's experts and attention lie; empty: as the other fields say
    """

    group_size: int = 128
    attention: str = "bf16"
    bits: int = 4
    layout: str = "compressed-tensors"
    symmetric: bool = True
    eight_bit: tuple[int, ...] = ()
    kv_cache: str = "bf16"
    command: str = "int4"
    title: str = "W{bits}A16-g{group_size}"
    activations: int = 16
    kinds: tuple[tuple[Kind, Kind], ...] = ()

    def bits_of(self, layer: int) -> int:
        """Bits of a layer's experts; attention has `bits` everywhere."""
        return 8 if layer in self.eight_bit else self.bits

    @property
    def stem(self) -> str:
        """The label without the method."""
        return self.title.format(bits=self.bits, group_size=self.group_size, activations=self.activations)

    @property
    def label(self) -> str:
        """Name of the artifact in tables and manifests."""
        return f"{self.stem}-rtn"

    @property
    def format(self) -> str:
        """The manifest's format."""
        return self.storage.manifest

    @property
    def storage(self) -> Format:
        """The storage format of its experts."""
        return choices(self.command)[self.layout]

    @property
    def whole(self) -> bool:
        """Whether attention is stored as the experts."""
        return self.attention == self.command

    def scheme(self, bits: int) -> Scheme:
        """How its experts of some width lie in the folder."""
        return Scheme(self.storage, bits, self.group_size, self.symmetric, activations=self.activations)

    def experts_scheme(self, source: Checkpoint, layer: int) -> Scheme | None:
        """How a layer's experts lie in the folder, None for bfloat16."""
        return self._planned(source, self.kinds[layer][0]) if self.kinds else self.scheme(self.bits_of(layer))

    def _planned(self, source: Checkpoint, kind: Kind) -> Scheme | None:
        scheme = kind.scheme(source)
        if scheme is None or not kind.calibrated:
            return scheme
        return replace(scheme, activations=self.activations)

    def attention_scheme(self, source: Checkpoint, layer: int) -> Scheme | None:
        """How its attention lies there."""
        if self.kinds:
            return self._planned(source, self.kinds[layer][1])
        if self.attention in ATTENTION_FP8:
            return fp8_scheme(source, choices("fp8")[ATTENTION_FP8[self.attention]])
        return self.scheme(self.bits) if self.whole else None

    def run(self) -> dict[str, Any]:
        """Everything that decides the bytes, apart from the source."""
        found: dict[str, Any] = {
            "command": self.command,
            "method": "rtn",
            "bits": self.bits,
            "group_size": self.group_size,
            "attention": self.attention,
            "format": self.layout,
            "symmetric": self.symmetric,
            "eight_bit": list(self.eight_bit),
            "kv_cache": self.kv_cache,
        }
        if self.kinds:
            found |= {"group_size": max(kind.span for pair in self.kinds for kind in pair), "plan": planned_words(self)}
        return found if self.activations == 16 else {**found, "activations": self.activations}

    def specs(self, source: Checkpoint, layer: int) -> list[TensorSpec]:
        """The tensors of one layer, in the order of the file."""
        check_groups(source.geometry, self.group_size, attention=self.attention, sizes=self.group_choices)
        check_mixture(self, source.geometry)
        found = plain_specs(source, plain_shapes(source.geometry, layer))
        experts, attention = self.experts_scheme(source, layer), self.attention_scheme(source, layer)
        for name, shape in matrix_shapes(source.geometry, layer):
            found.extend(scheme_specs(source, name, shape, experts if ".experts." in name else attention))
        if self.kv_cache == "fp8":
            found.extend(ct.cache_specs(*(source.names.attention(layer, name) for name in ("k_proj", "v_proj"))))
        return found

    @property
    def group_choices(self) -> tuple[int, ...]:
        """Group sizes that the format has."""
        return self.storage.group_sizes or GROUP_SIZES

    def layer(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        """The same tensors' values."""
        tensors = plain_tensors(source, plain_shapes(source.geometry, layer))
        attention = self.attention_scheme(source, layer)
        if on_grid(attention):
            for stack in stacks(attention.format, ATTENTION_STACKS):
                names = [source.names.attention(layer, projection) for projection in stack]
                weights = [source.read(name + ".weight").to(device).unsqueeze(0) for name in names]
                tensors |= stacked_tensors(attention, [[name] for name in names], weights)
        else:
            tensors |= self.carried_attention(source, layer, device)
        experts = self.experts_scheme(source, layer)
        if not on_grid(experts):
            return tensors | self.carried_experts(source, layer, device)
        for stack in stacks(experts.format, EXPERT_STACKS):
            tensors |= self._experts(source, layer, stack, device, experts)
        return tensors

    def carried_attention(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        """Attention in bfloat16 or FP8."""
        scheme, tensors = self.attention_scheme(source, layer), dict[str, Tensor]()
        for projection in ATTENTION:
            tensors |= carried_tensors(source, source.names.attention(layer, projection), device, scheme)
        return tensors

    def carried_experts(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        """A layer's experts in bfloat16 or FP8."""
        scheme, tensors = self.experts_scheme(source, layer), dict[str, Tensor]()
        for expert in range(source.geometry.experts):
            for projection in PROJECTIONS:
                tensors |= carried_tensors(source, source.names.expert(layer, expert, projection), device, scheme)
        return tensors

    def _experts(
        self, source: Checkpoint, layer: int, stack: tuple[str, ...], device: torch.device | str, scheme: Scheme
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        g = source.geometry
        step = max(1, (1 << 28) // (g.hidden * g.expert_width * len(stack)))  # 1 GiB of float32 weights at once
        for start in range(0, g.experts, step):
            chosen = range(start, min(start + step, g.experts))
            weights = [source.read_experts(layer, p, chosen, device, torch.float32) for p in stack]
            names = [[source.names.expert(layer, e, p) for e in chosen] for p in stack]
            tensors |= stacked_tensors(scheme, names, weights)
        return tensors

    def quantization_config(self, source: Checkpoint) -> dict[str, Any]:
        """config.json's quantization_config."""
        if not self.storage.mixes:
            return folder_config(self.scheme(self.bits), self.whole, source.names)
        return planned_config(self, source) if self.kinds else mixed_config(self, source)


def check_mixture(variant: WeightsVariant, g: Geometry) -> None:
    """InputError for what the format cannot hold, and for 8-bit layers that do not exist."""
    check_writable(variant.scheme(variant.bits))
    row, mixing = variant.storage, " or ".join(word for word, row in choices(variant.command).items() if row.mixes)
    if variant.attention in ATTENTION_FP8 and not row.mixes:
        said = f"attention {variant.attention}, expected bf16 or {variant.command} ({mixing} holds FP8 too)"
        raise InputError(f"format {variant.layout}: {said}")
    outside = [layer for layer in variant.eight_bit if not 0 <= layer < g.layers]
    if outside:
        raise InputError(f"8-bit layer {outside[0]}: the model has layers 0 to {g.layers - 1}")
    if variant.eight_bit and not (row.mixes and variant.symmetric):
        raise InputError(f"8-bit layers: expected format {mixing}, symmetric (no engine reads others)")
    if variant.kv_cache == "fp8" and not row.mixes:
        raise InputError(f"format {variant.layout}: scales of an FP8 KV cache, expected format {mixing}")


def mixed_config(variant: WeightsVariant, source: Checkpoint) -> dict[str, Any]:
    """quantization_config: one group for experts (and attention), groups by width, an FP8 group beside them.

    Top level pack-quantized: SGLang refuses "mixed-precision" for INT4 experts, so every group names its own format.
    """
    v, cache, attention = variant, variant.kv_cache == "fp8", variant.attention_scheme(source, 0)
    scheme, row = v.scheme(v.bits), v.storage
    whole = attention == scheme
    if whole and not v.eight_bit:
        return ct.one_group(scheme, True, source.names, cache)
    groups: dict[str, dict[str, Any]] = {}
    if v.eight_bit:
        groups[v.scheme(8).label] = ct.entry(v.scheme(8), [layers_target(v.eight_bit)])
    rest = tuple(layer for layer in range(source.geometry.layers) if layer not in v.eight_bit)
    targets = [layers_target(rest)] if v.eight_bit else [ct.EXPERTS_TARGET]
    if whole:
        targets.append(ct.ATTENTION_TARGET)
    if not v.eight_bit or rest or whole:
        groups[scheme.label] = ct.entry(scheme, targets)
    if attention is not None and not whole:
        groups[attention.label] = ct.entry(attention, [ct.ATTENTION_TARGET])
    ignore = (*source.names.ignore, ct.ATTENTION_TARGET) if attention is None else source.names.ignore
    return ct.quantization_config(groups, row.name, ignore, cache)


def planned_config(variant: WeightsVariant, source: Checkpoint) -> dict[str, Any]:
    """quantization_config of a plan: one group for each scheme, its targets name the layers; bfloat16 is ignored."""
    layers = range(source.geometry.layers)
    by_scheme: dict[Scheme | None, dict[str, list[int]]] = {}
    for layer in layers:
        found = (variant.experts_scheme(source, layer), variant.attention_scheme(source, layer))
        for part, scheme in zip((EXPERTS_PART, ATTENTION_PART), found, strict=True):
            by_scheme.setdefault(scheme, {}).setdefault(part, []).append(layer)
    groups: dict[str, dict[str, Any]] = {}
    ignore = list(source.names.ignore)
    for scheme, parts in by_scheme.items():
        targets = [layers_target(tuple(some), part) for part, some in parts.items()]
        if scheme is None:
            ignore += targets
        else:
            label = scheme.label if on_grid(scheme) and scheme.group < 0 else f"{scheme.label}-{_size(scheme)}"
            groups[label] = ct.entry(scheme, targets)
    return ct.quantization_config(groups, variant.storage.name, tuple(ignore), variant.kv_cache == "fp8")


def _size(scheme: Scheme) -> str:
    return f"g{scheme.group}" if scheme.block is None else "x".join(map(str, scheme.block))


def planned_words(variant: WeightsVariant) -> dict[str, str]:
    """A plan in short: of experts and attention the kinds with their layers, equal neighbours together."""
    found: dict[str, str] = {}
    for place, part in enumerate(("experts", "attention")):
        found[part] = layers_in_words([(layer, pair[place].word) for layer, pair in enumerate(variant.kinds)])
    return found
