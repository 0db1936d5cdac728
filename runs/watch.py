"""What a run tells while it works: a line where it continues, a log in JSON lines, times by artifact."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmquant.errors import FitError
from mmquant.monitor import KINDS, UNSEEN, current, tell
from mmquant.tables import gib

from .engine import step_name
from .journal import Journal

if TYPE_CHECKING:
    from .recipe.read import Limits


class Watch:
    """Hears the engine; keeps a journal's log. `artifacts`: how many are on their way."""

    def __init__(self, journal: Journal, artifacts: int, limits: Limits | None = None) -> None:
        """limits: FitError behind a step that took more memory or disk."""
        self.journal, self.artifacts, self.limits = journal, artifacts, limits
        self.steps, self._began, self._first = 0, time.monotonic(), 0
        self.seconds: dict[str, float] = {}
        self.counts: dict[tuple[str, str], int] = {}  # of the step at work
        self.warnings = 0

    def begin(self, first: int, steps: int) -> None:
        """The first step that is missing; a run that goes on says where."""
        self.steps, self._first, self._began = steps, first, time.monotonic()
        layers = steps - 2
        if 1 <= first <= layers:
            current().message(f"continues at layer {first - 1} of {layers}")
        elif first > layers:
            current().message("continues behind the last layer")
        self._log("begin", step=first, steps=steps, artifacts=self.artifacts)

    def job_begins(self, label: str, step: int) -> None:
        """An artifact's step is made now; whoever watches sees what, and what the machine has left."""
        free = shutil.disk_usage(self.journal.folder).free
        machine = f"{gib(resident())} memory, {free / 1e9:.1f} GB disk free"
        warned = f", {self.warnings} experts without tokens" if self.warnings else ""
        tell(f"{step_name(step, self.steps - 2)} of {self.steps - 2}: {label}; {machine}{warned}")

    def message(self, text: str) -> None:
        """A line that an artifact told the user, for the log."""
        self._log("message", text=text)

    def counted(self, label: str, kind: str, count: int) -> None:
        """So many of a kind in an artifact's step."""
        self.counts[label, kind] = self.counts.get((label, kind), 0) + count
        self.warnings += count if kind == UNSEEN else 0

    def job_done(self, label: str, step: int, seconds: float, stages: Mapping[str, float]) -> None:
        """An artifact's step is made."""
        self.seconds[label] = self.seconds.get(label, 0.0) + seconds
        if self.limits is not None:
            guarded(self.limits.ram, resident, "limits.ram", f"{label}, {step_name(step, self.steps - 2)}")
        counts = {kind: self.counts.pop((label, kind), 0) for kind in KINDS}
        counts = {kind: count for kind, count in counts.items() if count}
        self._log("artifact", name=label, step=step, seconds=round(seconds, 3), stages=dict(stages), **counts)

    def step_done(self, step: int, behind: Mapping[str, float]) -> None:
        """Every artifact's step is made: rates and what is left."""
        done = step + 1 - self._first
        each = (time.monotonic() - self._began) / done
        left = each * (self.steps - step - 1)
        free = shutil.disk_usage(self.journal.folder).free
        facts = {"seconds_per_step": round(each, 3), "seconds_left": round(left), "disk_free": free}
        self._log("step", step=step, memory=resident(), gpu=gpu_peak(), behind=dict(behind), **facts)

        if self.limits is not None:
            used = partial(in_folder, self.journal.folder)
            guarded(self.limits.disk, used, "limits.disk", step_name(step, self.steps - 2))

    def _log(self, event: str, **facts: object) -> None:
        self.journal.event(event, **facts)


def gpu_peak() -> int:
    """The most bytes of a GPU that this process had allocated since it was last asked; 0 without one."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def guarded(limit: int | None, used: Callable[[], int], what: str, where: str) -> None:
    """FitError where more is used than a limit of the recipe's."""
    if limit is not None and (found := used()) > limit:
        raise FitError(f"{what} {limit:,}: {found:,} bytes in use after {where}; run again with more, it continues")


def in_folder(folder: Path) -> int:
    """Bytes of all files of a run."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
