"""The reference's residual stream, shared by all GGUF runs of one text: each moves a copy of it through a layer.

The runs take turns. Whoever leaves a layer leaves the same values, so the copy of the last one is what enters the next
layer. On disk the stream is kept as it enters every step that some run has still to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..model.distributed import rank_share, world
from ..model.hidden import HiddenStates
from ..model.parts import Saver, drop_parts, take_part


class SharedReference:
    """W windows x T positions x H channels on their way; `users` runs take part, by number.

    Under torchrun each rank has its share of the windows.
    """

    def __init__(self, shape: tuple[int, int, int], place: torch.device, folder: Path) -> None:
        """shape: of all windows."""
        self.windows, self.own = shape[0], rank_share(shape[0], *world())
        self.shape, self.place, self.folder = (len(self.own), *shape[1:]), place, folder
        self._reached: dict[int, int] = {}  # user -> the step that it does next
        self._entering: HiddenStates | None = None
        self._leaving: HiddenStates | None = None
        self._step, self._saver = -1, Saver()

    def join(self) -> int:
        """The number of a new user."""
        self._reached[len(self._reached)] = 0
        return len(self._reached) - 1

    def begin(self, user: int, step: int, last: int) -> None:
        """A user starts with `step`; behind `last` it has nothing left to do."""
        self._reached[user] = step if step <= last else 1 << 30

    def enter(self, step: int) -> HiddenStates:
        """A copy of the stream that enters `step`, to be moved. InputError when its file is damaged or gone."""
        if self._entering is None or self._leaving is None:
            self._open(step)
        if step == self._step + 1:
            self._entering, self._leaving, self._step = self._leaving, self._entering, step
        assert step == self._step, (step, self._step)
        assert self._entering is not None
        assert self._leaving is not None
        if self._leaving is not self._entering and step:
            self._leaving.all().copy_(self._entering.all())
        return self._leaving

    def save(self, step: int) -> None:
        """Keep the stream as it enters `step`, which a user has just reached; `settle` waits for it."""
        if self._leaving is not None:
            self._saver.save(self.folder, self._stem(step), self._named(self._leaving), self.own, self.windows)

    def settle(self) -> None:
        """Wait until what was saved is durable."""
        self._saver.settle()

    def stop(self) -> None:
        """Save nothing more."""
        self._saver.stop()

    def forget(self, user: int, step: int, last: int) -> None:
        """A user has gone past `step`: what nobody will enter any more is deleted."""
        self.begin(user, step + 1, last)
        oldest = min(self._reached.values())
        drop_parts(self.folder, "reference", oldest)

    def _open(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        first, together = self._states(), len(self._reached) > 1
        self._entering, self._leaving, self._step = first, self._states() if together else first, step
        if step:
            take_part(self.folder, self._stem(step), self._named(first), self.own, self.windows)

    def _states(self) -> HiddenStates:
        return HiddenStates(*self.shape, folder=self.folder, device=self.place)

    def _named(self, states: HiddenStates) -> Mapping[str, HiddenStates]:
        return {"reference": states}

    def _stem(self, step: int) -> str:
        return f".hidden-{step:03d}-reference"
