"""The one loop that writes artifacts: step by step over the checkpoint, every artifact in turn at each step.

A step is the embeddings, one layer, or the final norm and head. An artifact remembers on disk how many of its steps are
durable, so a run that was killed takes up each one where it stood, at the cost of two steps: one made, one written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch

from mmquant.errors import naming
from mmquant.monitor import Bar, Monitor, current, phase, watching
from mmquant.stages import Stages, stage, timing

from .memory import memory_for

TURN = 5e-5  # seconds


class Shared(Protocol):
    """What several artifacts take from one computation, a layer's weights for example."""

    def release(self) -> None:
        """Nobody asks for this step's any more."""


class Job(Protocol):
    """One artifact on its way.

    label: its name in tables. path: what an engine is given in the end. finished: it was there, whole, before this run.
    """

    label: str
    finished: bool
    path: Path

    @property
    def uses(self) -> Sequence[Shared]:
        """What it shares with other jobs."""
        ...

    @property
    def steps(self) -> int:
        """How many there are: two more than layers."""
        ...

    @property
    def done(self) -> int:
        """Steps that are made; at first those that are durable."""
        ...

    def open(self) -> AbstractContextManager[None]:
        """Hold the folder, and be ready for step `done`."""
        ...

    def step(self, step: int) -> None:
        """Make the tensors of one step. They become durable behind it, at the latest while the next one is made."""
        ...

    def settle(self) -> None:
        """Wait until every step that was made is durable; raises what went wrong behind."""
        ...

    def finish(self) -> Path:
        """Check the files and write the manifest; `path`."""
        ...


class Watcher(Protocol):
    """Hears how far a run is."""

    def begin(self, first: int, steps: int) -> None:
        """The first step that is missing, and how many there are."""

    def job_begins(self, label: str, step: int) -> None:
        """An artifact's step is made now."""

    def message(self, text: str) -> None:
        """A line that an artifact told the user."""

    def counted(self, label: str, kind: str, count: int) -> None:
        """So many of a kind (mmquant/monitor.py) in an artifact's step."""

    def job_done(self, label: str, step: int, seconds: float, stages: Mapping[str, float]) -> None:
        """An artifact's step is made; the seconds of its stages."""

    def step_done(self, step: int, behind: Mapping[str, float]) -> None:
        """Every artifact's is; seconds that writing, hashing and checking took meanwhile, by stage."""


def step_name(step: int, layers: int) -> str:
    """What a step writes, in words: the first and the last are what stands outside the layers."""
    return f"layer {step - 1}" if 1 <= step <= layers else "embeddings" if step == 0 else "the head"


def run_jobs(
    jobs: Sequence[Job],
    label: str | None = None,
    always: Iterable[Shared] = (),
    before: Callable[[int], None] | None = None,
    after: Callable[[int], None] | None = None,
    watch: Watcher | None = None,
) -> None:
    """Write every artifact that is not finished.

    label: of the progress bar. always: released at the end of every step. before: called with the first
    step, when all are open; after: when all have done a step.
    watch: is told of every step of every artifact.
    """
    todo = [job for job in jobs if not job.finished]
    if not todo:
        return
    stages = Stages(settled)
    with ExitStack() as stack, timing(stages), handing_over():
        for job in todo:
            stack.enter_context(job.open())
        steps, first = todo[0].steps, min(job.done for job in todo)
        if watch is not None:
            watch.begin(first, steps)
        if before is not None:
            before(first)
        with phase(label or todo[0].label, steps, "step", first) as bar:
            for step in range(first, steps):
                ready = [job for job in todo if job.done == step]
                _take_turns(ready, step, len(jobs) > 1 or watch is not None, stages, watch)
                if after is not None:
                    _settle(todo, len(jobs) > 1)
                    with stage("evaluate"):
                        after(step)
                for shared in always:
                    shared.release()
                if watch is not None:
                    watch.step_done(
                        step, {**stages.take(), **{f"behind: {n}": s for n, s in stages.take(True).items()}}
                    )
                bar.advance()
        for job in todo:
            with _named(job.label) if len(jobs) > 1 else nullcontext():
                job.finish()


class _Prefixed:
    """Puts an artifact's name before its messages."""

    def __init__(self, inner: Monitor, name: str, watch: Watcher | None = None) -> None:
        self.inner, self.name, self.watch = inner, name, watch

    def start(self, phase: str, total: int | None, unit: str, done: int = 0) -> Bar:
        return self.inner.start(phase, total, unit, done)

    def message(self, text: str) -> None:
        self.inner.message(f"{self.name}: {text}")
        if self.watch is not None:
            self.watch.message(f"{self.name}: {text}")

    def counted(self, kind: str, count: int) -> None:
        if self.watch is not None:
            self.watch.counted(self.name, kind, count)


@contextmanager
def _named(label: str, watch: Watcher | None = None) -> Iterator[None]:
    """Errors and messages inside name the artifact."""
    with naming(label), watching(_Prefixed(current(), label, watch)):
        yield


@contextmanager
def handing_over() -> Iterator[None]:
    """With a GPU, threads hand the interpreter over after 50 microseconds instead of 5 milliseconds.

    The thread that feeds the GPU gives it up at each of the 40,000 launches of a layer, and gets it back when another
    thread's turn ends (docs/speed.md has what that costs).
    """
    before = sys.getswitchinterval()
    if torch.cuda.is_available():
        sys.setswitchinterval(TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def settled() -> None:
    """Wait for what this thread has given a CUDA device to do."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def _settle(jobs: Sequence[Job], several: bool) -> None:
    for job in jobs:
        with _named(job.label) if several else nullcontext():
            job.settle()


def _take_turns(jobs: Sequence[Job], step: int, several: bool, stages: Stages, watch: Watcher | None) -> None:
    """One step of each job; what they share goes with its last user."""
    for number, job in enumerate(jobs):
        if watch is not None:
            watch.job_begins(job.label, step)
        with memory_for(step_name(step, job.steps - 2)), _named(job.label, watch) if several else nullcontext():
            began = time.monotonic()
            with stage("other"):
                job.step(step)
        if watch is not None:
            watch.job_done(job.label, step, time.monotonic() - began, stages.take())
        later = {id(shared) for other in jobs[number + 1 :] for shared in other.uses}
        for shared in job.uses:
            if id(shared) not in later:
                shared.release()
