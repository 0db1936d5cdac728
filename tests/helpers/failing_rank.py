"""One rank of a command line that fails at a named point.

`python -m helpers.failing_rank KIND RANK LAYER ARGUMENTS...` runs `mmquant ARGUMENTS...`, as torchrun starts it; the
process of that rank is killed or stopped, or runs out of memory, before it reads that layer.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import torch

from mmquant.calibration.model import stream
from mmquant.convert.models.layer import LayerWeights


def memory() -> None:
    """More than any machine has: the allocator's own error."""
    torch.empty(1 << 56, dtype=torch.uint8)


FAILURES: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "memory": memory,
    "loop": lambda: [None for _ in iter(int, 1)],  # for ever: its threads live on
    "bug": lambda: {}["nothing"],
}


def fail_at(kind: str, rank: int, layer: int) -> None:
    """From here on this process fails before it reads the layer, if it is that rank."""
    inner = stream.read_layer_shared

    def read(source: object, number: int, *more: object) -> LayerWeights:
        if number == layer and int(os.environ.get("RANK", "0")) == rank:
            FAILURES[kind]()
        return inner(source, number, *more)  # type: ignore[arg-type]

    stream.read_layer_shared = read  # type: ignore[assignment]


if __name__ == "__main__":
    from mmquant.commands.cli import main

    _, what, who, where, *rest = sys.argv
    fail_at(what, int(who), int(where))
    sys.argv = ["mmquant", *rest]
    main()
