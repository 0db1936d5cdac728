"""Place weights, cache and buffers on the devices of a target: experts in RAM and layer split, or tensor parallel."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from ..models.geometry import Geometry
from . import memory
from .targets import Cards, Target
from .weights import Weights


@dataclass(frozen=True)
class Device:
    """One device of a budget, bytes; the parts add up to `used`. experts: of `weights`, the routed ones."""

    name: str
    usable: int
    weights: int
    kv: int
    compute: int
    staging: int
    runtime: int
    experts: int = 0

    @property
    def used(self) -> int:
        """All parts."""
        return self.weights + self.kv + self.compute + self.staging + self.runtime

    @property
    def margin(self) -> int:
        """What stays free; negative: what is missing."""
        return self.usable - self.used

    def row(self) -> dict[str, int | str]:
        """As the manifest has it."""
        parts = {"weights": self.weights, "kv": self.kv, "compute": self.compute, "staging": self.staging}
        rest = {"runtime": self.runtime, "used": self.used, "margin": self.margin}
        return {"device": self.name, "usable": self.usable, **parts, **rest}


@dataclass(frozen=True)
class Placement:
    """Where everything lies.

    engine           llama.cpp, vllm or mlx_lm
    cpu_layers       --n-cpu-moe: the first layers' experts lie in RAM
    split            --tensor-split: layers on each card, the head counting as one
    tensor_parallel  cards that share every matrix; expert_parallel: whole experts on each of them instead
    reason           why there is none
    """

    engine: str
    context: int
    cache: str
    devices: tuple[Device, ...]
    cpu_layers: int = 0
    split: tuple[int, ...] = ()
    tensor_parallel: int = 1
    expert_parallel: bool = False
    reason: str = ""

    @property
    def margin(self) -> int:
        """The smallest margin of its devices."""
        return min((device.margin for device in self.devices), default=-1)

    @property
    def missing(self) -> int:
        """Bytes that the devices lack."""
        return sum(max(0, -device.margin) for device in self.devices)


def place_llama(weights: Weights, g: Geometry, target: Target, context: int, cache: str) -> Placement:
    """As few layers' experts in RAM as leave 1 GiB free on each card; none free where that does not go.

    Where nothing fits, the one whose cards hold what they can.
    """
    if target.cards is None:
        return _in_ram(weights, g, target, context, cache)
    cards = target.cards

    def card_margin(placement: Placement) -> int:
        return min(device.margin for device in placement.devices[:-1])

    def offload(layers: int) -> Placement:
        return _offload(weights, g, target, cards, context, cache, layers)

    found = offload(0)
    for least in (memory.FREE, 0):
        found = offload(0)
        if card_margin(found) < least:
            few = bisect_left(range(1, g.layers + 1), True, key=lambda n: card_margin(offload(n)) >= least)
            found = offload(min(few + 1, g.layers))
        if found.margin >= least:
            return found
    return found


def _in_ram(weights: Weights, g: Geometry, target: Target, context: int, cache: str) -> Placement:
    """Everything in one memory: unified, or RAM without a card."""
    compute = memory.compute_bytes(g, context)
    kv = memory.kv_bytes(g, context, cache)
    name = "unified" if target.unified else "ram"
    device = Device(name, target.ram_usable, weights.total, kv, compute, 0, memory.HOST_RUNTIME, weights.experts)
    return Placement("llama.cpp", context, cache, (device,))


def _offload(
    weights: Weights, g: Geometry, target: Target, cards: Cards, context: int, cache: str, cpu_layers: int
) -> Placement:
    """The placement with so many layers' experts in RAM: cards take layers from the first on, the last the head."""
    dense = weights.resident - weights.embedding - weights.head
    kv, compute = memory.kv_bytes(g, context, cache), memory.compute_bytes(g, context)
    in_ram = weights.expert_layer[:cpu_layers]
    staging = memory.staging_bytes(max(in_ram, default=0))
    on_card = [0 if layer < cpu_layers else size for layer, size in enumerate(weights.expert_layer)]
    fixed = compute + staging + memory.CUDA_RUNTIME
    counts = split_layers([size + (dense + kv) // g.layers for size in on_card], weights.head, cards.count)
    devices: list[Device] = []
    first = 0
    for card, count in enumerate(counts):
        last = card == cards.count - 1
        share, experts = count / g.layers, sum(on_card[first : first + count])
        own = round(dense * share) + experts + (weights.head if last else 0)
        sizes = (own, round(kv * share), compute, staging, fixed - compute - staging)
        devices.append(Device(f"gpu{card}", cards.usable, *sizes, experts))
        first += count
    host = weights.embedding + sum(in_ram)
    devices.append(Device("ram", target.ram_usable, host, 0, 0, 0, memory.HOST_RUNTIME, sum(in_ram)))
    split = (*counts[:-1], counts[-1] + 1) if cards.count > 1 else ()
    return Placement("llama.cpp", context, cache, tuple(devices), cpu_layers, split)


def split_layers(sizes: list[int], head: int, count: int) -> list[int]:
    """Contiguous runs of layers for `count` cards whose largest sum is smallest; the head goes to the last one."""
    if count == 1:
        return [len(sizes)]
    low, high = max([*sizes, head]), sum(sizes) + head
    while low < high:
        middle = (low + high) // 2
        if len(_runs(sizes, head, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    runs = _runs(sizes, head, low)
    return [0] * (count - len(runs)) + runs


def _runs(sizes: list[int], head: int, most: int) -> list[int]:
    """Layers per card, filled from the last layer on (beside the head), none above `most` bytes."""
    runs, room = [0], most - head
    for size in reversed(sizes):
        if size > room:
            runs.insert(0, 0)
            room = most
        runs[0] += 1
        room -= size
    return runs


def place_vllm(weights: Weights, g: Geometry, target: Target, context: int, cache: str, group: int) -> Placement:
    """Tensor parallel over all cards; whole experts on each card where a group would be cut. RAM holds no weights."""
    if target.cards is None:
        return Placement("vllm", context, cache, (), reason="vLLM needs cards, and puts no experts into RAM")
    cards, count = target.cards, target.cards.count
    if reason := parallel_fault(g, count):
        return Placement("vllm", context, cache, (), tensor_parallel=count, reason=reason)
    cut = group > 0 and (g.expert_width % count or (g.expert_width // count) % group) != 0
    if cut and g.experts % count:
        reason = f"{g.expert_width}/{count} is not a multiple of the group size {group}, {g.experts} experts not of it"
        return Placement("vllm", context, cache, (), tensor_parallel=count, reason=reason)
    usable = int(cards.usable * memory.VLLM_SHARE)
    kv = -(-memory.kv_bytes(g, context, cache) // min(count, g.kv_heads))
    sizes = (-(-weights.total // count), kv, memory.VLLM_ACTIVATIONS, 0, memory.VLLM_RUNTIME)
    devices = tuple(Device(f"gpu{i}", usable, *sizes, weights.experts // count) for i in range(count))
    return Placement("vllm", context, cache, devices, tensor_parallel=count, expert_parallel=cut)


def parallel_fault(g: Geometry, count: int) -> str:
    """Why a model cannot be split over so many cards, nothing where it can."""
    if g.heads % count:
        return f"{g.heads} heads are not a multiple of {count} cards"
    if max(g.kv_heads, count) % min(g.kv_heads, count):
        return f"{g.kv_heads} key-value heads do not divide over {count} cards"
    return ""


def place_mlx(weights: Weights, g: Geometry, target: Target, context: int, cache: str) -> Placement:
    """Everything in unified memory."""
    if not target.unified:
        return Placement("mlx_lm", context, cache, (), reason="mlx_lm needs a Mac's unified memory")
    kv = memory.kv_bytes(g, context, cache)
    sizes = (weights.total, kv, memory.MLX_COMPUTE, 0, memory.HOST_RUNTIME)
    return Placement("mlx_lm", context, cache, (Device("unified", target.ram_usable, *sizes, weights.experts),))
