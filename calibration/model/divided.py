"""Divide a layer's pieces of work over the ranks of torchrun; every rank gets every result.

Pieces are the ones that a single process would take, whole: so results have the same bytes on any number of ranks.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import world

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def divided(pieces: Sequence[Piece], work: Callable[[Piece], Result]) -> Iterator[Result]:
    """`work` of every piece, in order: piece i is done by rank i modulo their number and sent to the others.

    One piece a rank is held at a time. Results are made of what pickle knows, arrays and tensors; those lie on this
    rank's device where the owner's did. All ranks must take all results.
    """
    rank, size = world()
    for first in range(0, len(pieces), size):
        mine = work(pieces[first + rank]) if first + rank < len(pieces) else None
        for owner in range(min(size, len(pieces) - first)):
            yield from_owner(partial(cast, Result, mine), owner)
        del mine


def from_owner(make: Callable[[], Result], owner: int = 0) -> Result:
    """What `make` returns at the owner, on every rank; the others do not call theirs. All ranks must come together.

    Tensors move as they are, the rest is pickled (between our own processes).
    """
    rank, size = world()
    if size == 1:
        return make()
    value = make() if rank == owner else None
    tensors: list[Tensor] = []
    frame = [_packed(value, tensors) if rank == owner else None]
    dist.broadcast_object_list(frame, src=owner)
    shapes: list[Any] = [[(tuple(t.shape), t.dtype, t.device.type) for t in tensors]]
    dist.broadcast_object_list(shapes, src=owner)
    if rank != owner:
        tensors = [torch.empty(shape, dtype=dtype, device=kind) for shape, dtype, kind in shapes[0]]
    tensors = [_sent(tensor, owner) for tensor in tensors]
    return value if rank == owner else _unpacked(frame[0], tensors)  # type: ignore[return-value]


def _sent(tensor: Tensor, owner: int) -> Tensor:
    """One tensor from its owner; NCCL moves what lies on a card."""
    through = tensor.cuda() if dist.get_backend() == "nccl" and tensor.device.type == "cpu" else tensor.contiguous()
    if through.numel():
        dist.broadcast(through.flatten().view(torch.uint8), src=owner)
    return through.to(tensor.device)


def _packed(value: object, tensors: list[Tensor]) -> bytes:
    class Packer(pickle.Pickler):
        def persistent_id(self, obj: object) -> tuple[int, str] | None:
            if isinstance(obj, Tensor):
                tensors.append(obj.detach())
                return len(tensors) - 1, "tensor"
            if isinstance(obj, np.ndarray):
                tensors.append(torch.from_numpy(np.ascontiguousarray(obj)))
                return len(tensors) - 1, "array"
            return None

    out = io.BytesIO()
    Packer(out).dump(value)
    return out.getvalue()


def _unpacked(data: bytes, tensors: list[Tensor]) -> Any:  # noqa: ANN401 - whatever was packed
    class Unpacker(pickle.Unpickler):
        def persistent_load(self, pid: tuple[int, str]) -> Tensor | np.ndarray:
            number, kind = pid
            return tensors[number] if kind == "tensor" else tensors[number].numpy()

    return Unpacker(io.BytesIO(data)).load()
