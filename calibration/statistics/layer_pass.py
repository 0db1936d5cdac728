"""Run calibration tokens through the model and collect statistics, layer by layer.

Memory: one layer's weights, the hidden states (stream.py) and the accumulators of one layer. When those of all experts
do not fit, experts are taken in chunks, one forward for each chunk; when the finished sums do not fit in memory either,
they lie in a memory-mapped temporary file.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import FitError
from mmquant.stages import stage
from mmquant.tables import gib

from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ...quantize.moments import Moments
from ..model.distributed import max_everywhere, rank_share, sum_everywhere, sum_to_owners, world
from ..model.forward import layer_forward
from ..model.hidden import leaving
from ..model.stream import Stream
from .collect import Collect
from .collector_cuda import collector_for
from .held import enough
from .layer import LayerStatistics, RoutingStatistics

LESS_MOMENTS = "--effort fast or --moments diagonal, a larger --memory or another --device help"


@dataclass(frozen=True)
class MomentPlan:
    """Where one layer's second moments are summed: `chunk` experts at a time, the finished ones in `results`."""

    chunk: int  # experts whose accumulators are held at once
    passes: int  # forwards of a layer
    results: str  # "device", "host" or "file"
    bytes: int  # accumulators held at once
    total: int  # second moments of all experts of a layer


def expert_moment_bytes(geometry: Geometry, collect: Collect) -> int:
    """Bytes of one expert's float32 second moments (gate and up share one)."""
    shared = collect.experts == "all"
    return 4 * (geometry.expert_width**2 + (0 if shared else geometry.hidden**2)) if collect.full else 0


def attention_moment_bytes(geometry: Geometry, collect: Collect) -> int:
    """Bytes of what is held once a layer: attention's second moments, and with every token the experts' shared one."""
    once = 2 if collect.experts == "all" else 1
    return 4 * (once * geometry.hidden**2 + (geometry.heads * geometry.head_dim) ** 2) if collect.full else 0


def plan_moments(geometry: Geometry, collect: Collect, memory: int, host: int | None = None) -> MomentPlan:
    """Fit the accumulators into `memory` bytes of the compute device, finished sums into `host` bytes.

    host None: the device is the host. Raises FitError when not even one expert fits.
    """
    each, fixed = expert_moment_bytes(geometry, collect), attention_moment_bytes(geometry, collect)
    total = each * geometry.experts
    if fixed + total <= memory:
        return MomentPlan(geometry.experts, 1, "device", fixed + total, total)
    chunk = (memory - fixed) // each
    if chunk < 1:
        needed = f"one expert's and the attention's take {gib(fixed + each)}"
        raise FitError(f"{gib(memory)} are left for moments, {needed}; {LESS_MOMENTS}")
    passes = -(-geometry.experts // chunk)
    chunk = -(-geometry.experts // passes)
    results = "host" if host is not None and total <= host else "file"
    return MomentPlan(chunk, passes, results, fixed + chunk * each, total)


_LIMITS: ContextVar[Mapping[str, int | None]] = ContextVar("mmquant.memory_limits", default={})  # noqa: B039  never changed


@contextmanager
def memory_limits(limits: Mapping[str, int | None]) -> Iterator[None]:
    """Plan inside with at most so many bytes for this process, by kind of device (`cpu`, `cuda`); None: no limit."""
    token = _LIMITS.set(dict(limits))
    try:
        yield
    finally:
        _LIMITS.reset(token)


def free_memory(device: torch.device | str) -> int:
    """Bytes that can be allocated now on the device: what the system calls available, within `memory_limits`."""
    device = torch.device(device)
    limit = _LIMITS.get().get(device.type)
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used
    else:
        used = _resident()
        free = _available() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes of this host share
    return free if limit is None else max(0, min(free, limit - used))


def _resident() -> int:
    """Bytes of this process in memory, as far as the system tells."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _available() -> int:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def layer_bytes(geometry: Geometry, dtype: torch.dtype) -> int:
    """Bytes of one dequantized layer's matrices."""
    g = geometry
    experts = 3 * g.experts * g.hidden * g.expert_width
    return (experts + g.hidden * g.head_dim * 2 * (g.heads + g.kv_heads)) * dtype.itemsize


def calibrate_layer(
    stream: Stream,
    weights: LayerWeights,
    domain: Tensor,
    domains: int,
    collect: Collect,
    plan: MomentPlan,
    *,
    first_window: int = 0,
    advance: bool = True,
    scratch: Path | None = None,
    hold: bool = False,
) -> LayerStatistics:
    """Statistics of the layer that the stream enters; then the stream has left it (unless `advance` is False).

    domain [W]: domain of each of the stream's windows; first_window: their number in the whole corpus; scratch: where a
    memory-mapped file may lie; hold: some rows are left out of the sums and handed over (Moments.held).
    """
    layer, g = stream.layer, stream.source.geometry
    chunks = [range(a, min(a + plan.chunk, g.experts)) for a in range(0, g.experts, plan.chunk)]
    results = None if len(chunks) == 1 or not collect.full else Results(g, collect, plan, scratch)
    found: LayerStatistics | None = None
    left = leaving(stream.source.label, layer)
    for number, kept in enumerate(chunks):
        collector = collector_for(weights, collect)(
            layer, weights, g, collect, domains, kept, first=number == 0, hold=hold
        )
        for start, values in stream.hidden.batches(stream.batch, stream.device):
            count = values.shape[0]
            collector.begin(first_window + start, values.shape[1], domain[start : start + count])
            with stage("forward"):
                out = layer_forward(weights, g, values, collector)
            if advance and number == len(chunks) - 1:
                stream.hidden.put(start, out, None if collect.skip_nonfinite else left)
        part = collector.statistics()
        found = part if found is None else found
        if results is not None:
            results.put(kept, part)
            found = dataclasses.replace(
                found, expert_in=_without(found.expert_in), expert_mid=_without(found.expert_mid)
            )
    assert found is not None
    if advance:
        stream.layer += 1
    return found if results is None else results.whole(found)


def _without(moments: Moments) -> Moments:
    return dataclasses.replace(moments, second=None)


class Results:
    """Finished second moments of all experts, chunk after chunk, in host memory or in a memory-mapped file."""

    def __init__(self, geometry: Geometry, collect: Collect, plan: MomentPlan, scratch: Path | None) -> None:
        self.shared = collect.experts == "all"
        self._in_file, self._scratch = plan.results == "file", scratch
        experts = geometry.experts
        self.first = self._empty(1 if self.shared else experts, geometry.hidden)
        self.mid = self._empty(experts, geometry.expert_width)

    def _empty(self, experts: int, inputs: int) -> Tensor:
        shape = (experts, inputs, inputs)
        if not self._in_file:
            return torch.empty(shape, dtype=torch.float32)
        # Unlinked from the start: a killed process leaves nothing behind; the mapping lives as long as the tensor.
        with tempfile.TemporaryFile(dir=self._scratch, prefix=".moments-") as file:
            file.truncate(4 * experts * inputs * inputs)
            return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=shape))

    def put(self, experts: range, part: LayerStatistics) -> None:
        """Take over the second moments of some experts from a further pass."""
        assert part.expert_in.second is not None
        assert part.expert_mid.second is not None
        self.mid[experts.start : experts.stop] = part.expert_mid.second.cpu()
        if not self.shared:
            self.first[experts.start : experts.stop] = part.expert_in.second.cpu()
        elif experts.start == 0:
            self.first[:] = part.expert_in.second[:1].cpu()

    def whole(self, found: LayerStatistics) -> LayerStatistics:
        """The first pass's statistics (on the CPU) with all second moments."""
        found = to_device(found, "cpu")
        first = self.first.expand(len(self.mid), -1, -1) if self.shared else self.first
        return dataclasses.replace(
            found, expert_in=_with(found.expert_in, first), expert_mid=_with(found.expert_mid, self.mid)
        )


def _with(moments: Moments, second: Tensor) -> Moments:
    diagonal = second.diagonal(dim1=1, dim2=2).clone()
    return dataclasses.replace(moments, second=second, diagonal=diagonal)


def to_device(value: LayerStatistics, device: torch.device | str) -> LayerStatistics:
    """The statistics with every tensor on `device`."""

    def moved(part: object) -> object:
        if isinstance(part, Tensor):
            return part.to(device)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            return dataclasses.replace(part, **{f.name: moved(getattr(part, f.name)) for f in dataclasses.fields(part)})
        return part

    return moved(value)  # type: ignore[return-value]


MAXIMA = ("amax", "sum32", "sum16")
MATRICES = ("second", "held")


def sum_over_ranks(found: LayerStatistics) -> LayerStatistics:
    """All ranks' statistics added in rank order: small sums and attention's on every rank, experts' with their owners.

    Rank r owns the experts `rank_share(E, r, size)`: of the others its `second` and `held` hold what it saw itself.
    The second moments are changed in place. Alone: the statistics themselves.
    """
    rank, size = world()
    if size == 1:
        return found

    def moments(value: Moments) -> Moments:
        sums = {}
        for field in dataclasses.fields(value):
            tensor = getattr(value, field.name)
            if field.name in MATRICES:
                tensor = None if tensor is None else whole_with_owners(tensor)
                sums[field.name] = enough(tensor) if tensor is not None and field.name == "held" else tensor
            else:
                sums[field.name] = everywhere(tensor, field.name in MAXIMA)
        return dataclasses.replace(value, **sums)

    def everywhere(tensor: Tensor, largest: bool) -> Tensor:
        return max_everywhere(tensor) if largest else sum_everywhere(tensor)

    routing = found.routing
    return LayerStatistics(
        layer=found.layer,
        attention_in=moments(found.attention_in),
        attention_out=moments(found.attention_out),
        expert_in=moments(found.expert_in),
        expert_mid=moments(found.expert_mid),
        routing=RoutingStatistics(*(everywhere(getattr(routing, f.name), False) for f in dataclasses.fields(routing))),
        hidden_amax=everywhere(found.hidden_amax, True),
        mid_amax=everywhere(found.mid_amax, True),
        kv_amax=everywhere(found.kv_amax, True),
        own=rank_share(found.expert_mid.matrices, rank, size),
    )


def whole_with_owners(tensor: Tensor) -> Tensor:
    """[E, ...] summed over ranks: with the owners, in place; of one matrix, or of equal ones, everywhere."""
    if len(tensor) == 1 or tensor.stride(0) == 0:
        return sum_everywhere(tensor[:1]).expand(len(tensor), *tensor.shape[1:])
    sum_to_owners(tensor)
    return tensor
