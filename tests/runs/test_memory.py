"""Real out-of-memory errors give one line: where, what was asked for, what is free."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmquant.errors import FitError
from mmquant.runs.memory import memory_for

HUGE = 1 << 50


def test_torch() -> None:
    words = rf"layer 3: out of memory: {HUGE} bytes asked for, [\d.,]+ GiB are free; fewer or shorter windows"
    with pytest.raises(FitError, match=words), memory_for("layer 3"):
        torch.empty(HUGE, dtype=torch.uint8)


def test_numpy_and_python() -> None:
    with pytest.raises(FitError, match=r"the head: out of memory: 1\.00 PiB asked for"), memory_for("the head"):
        np.empty(HUGE, np.uint8)
    with pytest.raises(FitError, match="the head: out of memory, "), memory_for("the head"):
        bytearray(HUGE)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_for("layer 3"):
        torch.zeros(3).view(2, 2)
