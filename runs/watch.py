"""What a run tells while it works: a line where it continues, a log in JSON lines, times by artifact."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from mmquant.monitor import current

from .journal import Journal


class Watch:
    """Hears the engine; keeps a journal's log. `artifacts`: how many are on their way."""

    def __init__(self, journal: Journal, artifacts: int) -> None:
        self.journal, self.artifacts = journal, artifacts
        self.steps, self._began, self._first = 0, time.monotonic(), 0
        self.seconds: dict[str, float] = {}

    def begin(self, first: int, steps: int) -> None:
        """The first step that is missing; a run that goes on says where."""
        self.steps, self._first, self._began = steps, first, time.monotonic()
        layers = steps - 2
        if 1 <= first <= layers:
            current().message(f"continues at layer {first - 1} of {layers}")
        elif first > layers:
            current().message("continues behind the last layer")
        self._log("begin", step=first, steps=steps, artifacts=self.artifacts)

    def job_done(self, label: str, step: int, seconds: float, stages: Mapping[str, float]) -> None:
        """An artifact's step is made."""
        self.seconds[label] = self.seconds.get(label, 0.0) + seconds
        self._log("artifact", name=label, step=step, seconds=round(seconds, 3), stages=dict(stages))

    def step_done(self, step: int, behind: Mapping[str, float]) -> None:
        """Every artifact's step is made: rates and what is left."""
        done = step + 1 - self._first
        each = (time.monotonic() - self._began) / done
        left = each * (self.steps - step - 1)
        free = shutil.disk_usage(self.journal.folder).free
        facts = {"seconds_per_step": round(each, 3), "seconds_left": round(left), "disk_free": free}
        self._log("step", step=step, memory=resident(), gpu=gpu_peak(), behind=dict(behind), **facts)

    def _log(self, event: str, **facts: object) -> None:
        self.journal.event(event, **facts)


def gpu_peak() -> int:
    """The most bytes of a GPU that this process had allocated since it was last asked; 0 without one."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
