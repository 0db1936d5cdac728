"""Plan how many experts of a GGUF layer a device calibrates and solves at once.

On the device lie, at the peak of a layer: its weights twice (as they were and as they are written), own and cross
moments of `chunk` experts and of their pool, and either the work of a solve of `step` experts or the activations of a
batch of text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmquant.errors import FitError
from mmquant.tables import gib

from ...convert.models.geometry import Geometry
from ..folder.solve import working_memory
from ..model.forward import rows_at_once
from ..model.stream import batch_windows
from ..statistics.layer_pass import free_memory, layer_bytes
from .held import HELD

WEIGHT_COPIES, MOMENT_COPIES = 11, 8  # float32 copies of weights and of moments that a solve holds at once
CPU_WORK = 1 << 29  # bytes of them on a CPU
SMALLER = 4  # batches on a CPU, of those elsewhere in calibration: rows of a few MB are allocated without page faults
USABLE = 0.9  # of what is free: the allocator's blocks have gaps
# Bytes of activations: of a routed row by hidden and inner channel, of a token by hidden channel and by attention's.
ROW_HIDDEN, ROW_INNER, TOKEN_HIDDEN, TOKEN_HEADS = 8, 18, 32, 8
LESS = "--effort fast, a shorter --context or another --device need less"


@dataclass(frozen=True)
class ExpertPlan:
    """chunk: experts whose moments are held at once, a multiple of both steps or all, never less than a step.

    step, down: experts whose gate and up, or down, are solved together. They decide a code's last ties on CUDA (batched
    products round otherwise) and depend on the card alone; the chunk depends on what is free and decides nothing.
    """

    chunk: int
    step: int
    down: int

    def chunks(self, experts: int) -> list[range]:
        """Ranges of experts that are calibrated one after the other."""
        return [range(start, min(experts, start + self.chunk)) for start in range(0, experts, self.chunk)]


def text_batch(length: int, device: torch.device | str) -> int:
    """Windows of `length` tokens that go through a layer at once."""
    windows = batch_windows(length, device)
    return max(1, windows // SMALLER) if torch.device(device).type == "cpu" else windows


def pair_bytes(inputs: int, outputs: int = 0) -> int:
    """Own and cross moments of one matrix, its held-out rows, and the drift of its outputs (Pair.drift)."""
    return 4 * (2 * inputs * (inputs + HELD) + outputs * (inputs + HELD))


def expert_bytes(g: Geometry) -> int:
    """Moments of an expert: of its inputs, or later of what enters down, which adds to the residual stream."""
    return max(pair_bytes(g.hidden), pair_bytes(g.expert_width, g.hidden))


def solve_bytes(rows: int, inputs: int) -> int:
    """Working memory of one matrix's solve."""
    return 4 * inputs * (WEIGHT_COPIES * rows + MOMENT_COPIES * inputs)


def solve_memory(device: torch.device | str) -> int:
    """Bytes that solves may take; never what is free at the time, so that equal runs give equal bytes."""
    device = torch.device(device)
    return working_memory(device) if device.type == "cuda" else CPU_WORK


def activation_bytes(g: Geometry, device: torch.device | str, tokens: int) -> int:
    """What a batch of `tokens` tokens takes on its way through both layers."""
    rows = min(rows_at_once(torch.device(device)), tokens * g.experts_per_token)
    experts = rows * (ROW_HIDDEN * g.hidden + ROW_INNER * g.expert_width)
    heads = TOKEN_HEADS * tokens * (g.hidden + 2 * g.head_dim * (g.heads + g.kv_heads))
    return TOKEN_HIDDEN * tokens * g.hidden + max(experts, heads)


def layer_peak(g: Geometry, dtype: torch.dtype, plan: ExpertPlan, work: int, activations: int) -> int:
    """Bytes on the device while a layer is quantized."""
    return 2 * layer_bytes(g, dtype) + (plan.chunk + 1) * pair_bytes(g.hidden) + max(work, activations)


def plan_experts(g: Geometry, moments: int, work: int) -> ExpertPlan:
    """Fit a layer's experts into `moments` bytes for their moments (`least_moments`) and `work` bytes for a solve."""
    inputs, inner = solve_bytes(2 * g.expert_width, g.hidden), solve_bytes(g.hidden, g.expert_width)
    step, down = (min(g.experts, max(1, work // each)) for each in (max(inputs, inner), inner))
    chunk, down = moments // expert_bytes(g), down - down % step
    chunk = g.experts if chunk >= g.experts else max(down, chunk - chunk % down)
    return ExpertPlan(chunk, step, down)


def least_moments(g: Geometry, work: int) -> int:
    """Bytes of moments below which solves would have to be smaller, and their bytes others: of one step of down."""
    return plan_experts(g, 0, work).down * expert_bytes(g)


def moment_memory(g: Geometry, dtype: torch.dtype, device: torch.device | str, tokens: int, held: int = 0) -> int:
    """Bytes that moments may take beside everything else that a layer needs, by what is free now.

    tokens: of a batch; held: bytes that will be taken and are not yet. Raises FitError below `least_moments`.
    """
    free, work = free_memory(device), solve_memory(device)
    other = 2 * layer_bytes(g, dtype) + max(work, activation_bytes(g, device, tokens)) + pair_bytes(g.hidden)
    left, least = int((free - held) * USABLE) - other, least_moments(g, work)
    if left < least:
        needed = (other + least) / USABLE + held
        raise FitError(f"layer 0: {device} has {gib(free)} of memory free, a layer needs {gib(int(needed))}; {LESS}")
    return left


def stream_place(g: Geometry, device: torch.device | str, moments: int, size: int) -> torch.device:
    """Where `size` bytes of hidden states lie: on a GPU when all experts' moments fit into `moments` beside them."""
    device = torch.device(device)
    room = moments - g.experts * expert_bytes(g)
    return device if device.type == "cuda" and size <= room else torch.device("cpu")
