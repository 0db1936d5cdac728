"""Look for what engines read wrongly in a quantized folder, ours or anybody's, without the original.

Block scales in E4M3: Marlin (vLLM on A100 and H100) multiplies those of all experts of a layer by the power of two that
brings the largest nearest to 448, and writes as zero what is below 2^-6 then: such blocks are lost there, not on
Blackwell. It takes no negative ones. What engines fuse (gate and up; q, k and v) they give one scale of whole matrices.
Source: vLLM marlin_utils_fp4.py (nvfp4_marlin_process_scales), 0.33.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmquant.errors import InputError

from ..checkpoints.batches import batches
from ..checkpoints.quantized_folder import QuantizedFolder
from ..findings import Finding
from ..formats.format import BlockScales
from ..models.names import ATTENTION_STACKS, EXPERT_STACKS
from .check import check_engines, check_layer, check_places

LARGEST, LEAST = 448.0, 2.0**-6


@dataclass(frozen=True)
class Lost:
    """Blocks of a layer's stack of experts that hold something, and those of them that Marlin writes as zero."""

    where: str
    live: int
    lost: int


def examine_folder(source: QuantizedFolder, device: torch.device | str = "cpu") -> list[Finding]:
    """All faults that show without the original, layer by layer."""
    source.validate()
    found = [Finding("error", "the folder", line.removeprefix(f"{source.label}: ")) for line in source.warnings]
    found += caught(source, "the folder", lambda: check_places(source))
    lost: list[Lost] = []
    for layer in range(source.geometry.layers):
        where = f"layer {layer}"
        found += caught(source, where, lambda layer=layer: check_engines(source, layer))
        found += caught(source, where, lambda layer=layer: check_layer(source, layer, device))
        for stack in stacks_of(source, layer):
            faults, blocks = examine_stack(source, stack, device)
            found += faults
            lost += [blocks] if blocks is not None and ".experts." in stack[0][0] else []
    return found + lost_finding(lost)


def caught(source: QuantizedFolder, where: str, check: Callable[[], None]) -> list[Finding]:
    """The first fault that a check of folders raises."""
    try:
        check()
    except InputError as error:
        return [Finding("error", where, str(error).removeprefix(f"{source.label}: "))]
    return []


def stacks_of(source: QuantizedFolder, layer: int) -> Iterator[list[list[str]]]:
    """Names of the matrices that engines stack, [S][n]: all experts of a layer together."""
    for stack in ATTENTION_STACKS:
        yield [[source.names.attention(layer, projection)] for projection in stack]
    for stack in EXPERT_STACKS:
        experts = range(source.geometry.experts)
        yield [[source.names.expert(layer, e, projection) for e in experts] for projection in stack]


def examine_stack(
    source: QuantizedFolder, stack: list[list[str]], device: torch.device | str
) -> tuple[list[Finding], Lost | None]:
    """Faults of block scales, and the blocks that Marlin loses; nothing for a format without such scales."""
    scheme = source.matrices[stack[0][0]].scheme
    if scheme is None or scheme.format.block_scales is None:
        return [], None
    where = " and ".join(names[0] for names in stack).replace(".experts.0.", ".experts.*.")
    units: list[Tensor] = []
    scales: list[Tensor] = []
    for names in stack:
        parts = [block_scales(source, [names[i] for i in part], device) for part in batches(len(names))]
        units.append(torch.cat([part.unit for part in parts]))
        scales += [part.scales[part.live] for part in parts]
    counts = torch.cat([s.flatten().float() for s in scales])
    found = [Finding("error", where, fault) for fault in _faults(counts, units)]
    if scheme.activations == 4:
        found += _without_input_scale(source, stack)
    if not len(counts) or not float(counts.max()) > 0:
        return found, None
    factor = torch.exp2(torch.floor(torch.log2(LARGEST / counts.max()))).clamp(min=1)
    return found, Lost(where, len(counts), int((counts * factor < LEAST).sum()))


def block_scales(source: QuantizedFolder, names: list[str], device: torch.device | str) -> BlockScales:
    """The block scales of matrices that are stored alike."""
    scheme = source.matrices[names[0]].scheme
    assert scheme is not None
    assert scheme.format.block_scales is not None
    return scheme.format.block_scales(source.fetch(names, device))


def _faults(scales: Tensor, units: list[Tensor]) -> Iterator[str]:
    if bool((scales < 0).any()):
        yield "has negative block scales, which Marlin (vLLM on A100 and H100) reads wrongly"
    if any(not torch.equal(units[0], unit) for unit in units[1:]):
        yield "have different global scales, engines take one for what they fuse"


def _without_input_scale(source: QuantizedFolder, stack: list[list[str]]) -> list[Finding]:
    scheme = source.matrices[stack[0][0]].scheme
    assert scheme is not None
    needed = {p.suffix for p in scheme.format.parts(scheme, (32, 32)) if p.suffix.startswith("input_")}
    names = [name for names in stack for name in names if not needed <= source.matrices[name].parts.keys()]
    if not names:
        return []
    text = f"{len(names)} matrices have no {' or '.join(sorted(needed))}: engines take what is in memory"
    return [Finding("error", names[0], text)]


def lost_finding(stacks: list[Lost]) -> list[Finding]:
    """One line for the whole folder, naming the worst place."""
    lost = sum(stack.lost for stack in stacks)
    if not lost:
        return []
    live, worst = sum(stack.live for stack in stacks), max(stacks, key=lambda stack: stack.lost / max(1, stack.live))
    text = f"Marlin (vLLM on A100 and H100) writes {lost / live:.3%} of the experts' blocks as zero, most of "
    text += f"{worst.where}: {worst.lost / worst.live:.3%}; Blackwell does not"
    return [Finding("warning", "weight_scale", text)]
