"""Write and read one layer's statistics as a safetensors file, tensor by tensor, from the ranks that own them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ...convert.checkpoints.write import Entry
from ...quantize.moments import Moments
from ..model.distributed import movable, rank_share, sum_everywhere, world
from .layer import MOMENT_FIELDS, MOMENT_SETS, ROUTING_FIELDS, LayerStatistics
from .triangles import STORED, triangle

SQUARES = "squares"  # |S|_F^2 of each second moment, for the report without reading the moments
SHARED = "shared"  # second moment of the experts' input when every expert saw every token


def entries(found: LayerStatistics, dtype: str) -> Iterator[Entry]:
    """The tensors of a layer file, in its order; second moments in `dtype`."""

    def small(name: str, value: Tensor) -> Entry:
        return Entry(name, "F32", tuple(value.shape), lambda: iter([value]))

    for set_name in MOMENT_SETS:
        moments: Moments = getattr(found, set_name)
        for field in MOMENT_FIELDS:
            value = getattr(moments, field)
            if field != "second":
                yield small(f"{set_name}.{field}", value)
        if found.expert_mid.second is not None:
            yield _second(set_name, moments, dtype)
    for field in ROUTING_FIELDS:
        yield small(f"routing.{field}", getattr(found.routing, field))
    for set_name in ("expert_in", "expert_mid"):
        moments = getattr(found, set_name)
        if found.expert_mid.second is not None:
            yield small(f"{set_name}.{SQUARES}", squares_of(moments))
    yield small("hidden_amax", found.hidden_amax)
    yield small("mid_amax", found.mid_amax)
    yield small("kv_amax", found.kv_amax)


def squares_of(moments: Moments) -> Tensor:
    """[E] squared Frobenius norms of second moments, those of other ranks included. Every rank must call it."""
    rank, size = world()
    out = torch.zeros(moments.matrices, device=moments.diagonal.device)
    assert moments.second is not None
    own = rank_share(moments.matrices, rank, size)
    for expert in own:
        out[expert] = moments.second[expert].square().sum()
    return sum_everywhere(out)


def _second(set_name: str, moments: Moments, dtype: str) -> Entry:
    """Second moments of one set, expert by expert, fetched from their owners."""
    rank, size = world()
    inputs, target = moments.inputs, STORED[dtype]
    packed = inputs * (inputs + 1) // 2
    second = moments.second
    one = set_name == "expert_in" and second is not None and second.stride(0) == 0 and len(second) > 1
    matrices = 1 if one else moments.matrices

    def values() -> Iterator[Tensor]:
        for owner in range(size):
            part = rank_share(matrices, owner, size) if matrices > 1 else range(1 if owner == 0 else 0)
            for matrix in part:
                if owner == rank:
                    assert second is not None
                    value = triangle(second[matrix]).to(target[0])
                    if rank != 0:
                        dist.send(movable(value.view(torch.uint8).contiguous()), dst=0)
                else:
                    value = torch.empty(packed, dtype=target[0], device=moments.diagonal.device)
                    if rank == 0:
                        value = movable(value)
                        dist.recv(value.view(torch.uint8), src=owner)
                yield value

    return Entry(f"{set_name}.second" + (f".{SHARED}" if one else ""), target[1], (matrices, packed), values)
