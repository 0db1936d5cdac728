"""What makes the bytes of a GGUF file's tensors, step by step, for the one loop that writes them (runs/gguf_job.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from .solve import Report


class TensorProvider(Protocol):
    """Tensors of a planned file in order. `report`: what was done beyond rounding.

    One that carries something from step to step keeps it on disk, so that a killed run goes on with the same bytes.
    """

    report: Report

    def begin(self, step: int) -> None:
        """Be ready for `step`, the first that is missing. InputError where what it needs is damaged or gone."""

    def tensors(self, step: int) -> Iterable[tuple[str, np.ndarray]]:
        """(name, bytes) of the tensors of one step, in order."""
        ...

    def save(self, step: int) -> None:
        """Keep what enters `step`, as it is now; it is durable after `settle`, before the writer has `step`."""

    def settle(self) -> None:
        """Wait until what was kept is durable; called by the writing thread."""

    def stop(self) -> None:
        """Keep nothing more: the run has failed or ended."""

    def forget(self, step: int) -> None:
        """Delete what entered `step`: the writer, whose thread calls this, has gone past it."""
