"""GGUF tensors without calibration: every weight at the nearest point of its grid."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ...convert.gguf.plan import GgufPlan
from ...convert.source import Source
from .encode import encode_tensors
from .provider import TensorProvider
from .solve import Report


class NearestRun(TensorProvider):
    """The tensors of `plan` from the weights alone; nothing is carried from step to step."""

    def __init__(self, source: Source, plan: GgufPlan, device: torch.device | str) -> None:
        self.source, self.plan, self.device, self.report = source, plan, device, Report()

    def tensors(self, step: int) -> Iterator[tuple[str, np.ndarray]]:
        """(name, bytes) of the tensors of one step, in order."""
        return encode_tensors(self.source, self.plan.steps[step], self.device)
