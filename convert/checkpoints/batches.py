"""Copy many equal tensors at once between files and a device, through one staging buffer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mmquant.errors import InputError

from .store import ShardStore, TensorInfo
from .tensors import truncated

READERS = 8
BATCH = 16  # experts of a projection that are staged together: 75 MB of FP8 at M2.7's size


def batches(count: int, size: int = BATCH) -> Iterator[range]:
    """0..count-1 in ranges of `size`."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def to_host(values: Tensor) -> Tensor:
    """The values on the CPU, from CUDA through pinned memory (which later calls find again once it is free)."""
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values) if values.is_cuda else values


def read_batch(store: ShardStore, infos: list[TensorInfo], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """[n, *shape] on the device of n tensors of one shape and dtype, as stored.

    Raises ValueError for tensors that are not alike and for a shard that is cut off.
    """
    first = infos[0]
    for info in infos:
        if info.shape != first.shape or info.dtype != first.dtype:
            found = f"{info.dtype} {list(info.shape)}, {first.name} is {first.dtype} {list(first.shape)}"
            raise InputError(f"{store.label}: {info.shard}: {info.name} is {found}: expected experts stored alike")
    pinned = torch.device(device).type == "cuda"
    staging = torch.empty((len(infos), first.size), dtype=torch.uint8, pin_memory=pinned)
    paths = [store.path(info.shard) for info in infos]

    def one(row: int) -> None:
        info = infos[row]
        with open(paths[row], "rb", buffering=0) as file:
            file.seek(info.offset)
            view, got = staging[row].numpy().data, 0
            while got < info.size:
                step = file.readinto(view[got:])
                if not step:
                    raise truncated(store, info, got)
                got += step

    with ThreadPoolExecutor(min(READERS, len(infos))) as pool:
        list(pool.map(one, range(len(infos))))
    return staging.to(device, non_blocking=pinned).view(dtype).view(len(infos), *first.shape)
