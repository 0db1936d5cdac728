"""Statistics as an artifact of a run: what `mmquant calibrate` writes, out of a pass that others need anyway."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mmquant.errors import InputError

from ..calibration.model.distributed import world
from ..calibration.model.divided import from_owner
from ..calibration.model.stream import forget
from ..calibration.statistics.live import PassOptions, SharedPass
from ..calibration.statistics.run import writer_of
from ..calibration.statistics.store import StatisticsWriter
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.atomic import making
from ..convert.files.lock import hold
from .calibrate import export_imatrix, pass_options, write_report
from .options import CalibrateOptions
from .passes import Passes

if TYPE_CHECKING:
    from ..calibration.text.corpus import Corpus
    from .engine import Shared

IMATRIX = "imatrix.gguf"


class StatisticsJob:
    """Every expert's statistics in a folder, and on request an importance matrix, which its path then names."""

    def __init__(self, source: Checkpoint, options: CalibrateOptions, out: Path, passes: Passes) -> None:
        self.source, self.options, self.out, self.path, self.label = source, options, out, out, "statistics"
        self.imatrix = None if options.imatrix is None else out / options.imatrix.name
        self.corpus: Corpus = passes.corpus(options)
        self.settings: PassOptions = pass_options(source, options, passes.device)
        self.steps, self.bytes = source.geometry.layers + 2, 0
        writer = self._writer()
        missing = [p for p in (out / "report.html", self.imatrix) if p is not None and not p.is_file()]
        self.first = world()[0] == 0  # the rank that writes
        self.finished = from_owner(lambda: writer.done == source.geometry.layers and not missing)
        self.provider: SharedPass = passes.reference_pass(self.corpus, self.settings, out / ".mmquant-streams")
        self.run = {"command": "calibrate", "identity": writer.identity}
        self.done = 0

    @property
    def uses(self) -> Sequence[Shared]:
        """The pass."""
        return [self.provider]

    def _writer(self) -> StatisticsWriter:
        return writer_of(self.source, self.corpus, self.out, self.settings, self.options.store, None)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder; what is there must be of the same run."""
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out}: a file, expected a folder or nothing")
        with making(self.out), hold(self.out) if self.first else nullcontext():
            self.writer = self._writer()
            self.writer.commit()
            self.done = from_owner(lambda: self.writer.done + 1 if self.writer.done else 0)
            yield

    def step(self, step: int) -> None:
        """The statistics of a layer; nothing of what stands outside the layers."""
        if 1 <= step <= self.source.geometry.layers:
            self.writer.write(self.provider.layer(step - 1).statistics)
            self.writer.commit()
        self.done = step + 1

    def settle(self) -> None:
        """Every step is durable when it is made."""

    def finish(self) -> Path:
        """Report and importance matrix."""
        if not self.first:
            forget(self.out)
            return self.path
        write_report(self.out, self.corpus, self.source)
        if self.imatrix is not None:
            export_imatrix(self.out, self.imatrix)
        forget(self.out)
        return self.out
