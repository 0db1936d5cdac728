"""Hold this process to a share of a GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def at_most(device: str, size: int | None) -> Iterator[None]:
    """Let torch allocate at most `size` bytes of the device inside; what asks for more is out of memory. None: all."""
    if size is None or not device.startswith("cuda"):
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / whole), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
