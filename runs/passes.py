"""What the artifacts of one run share: calibration text, statistics of the reference, and its residual stream."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING

from .options import TextOptions

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibration.gguf.reference import SharedReference
    from ..calibration.gguf.run_fast import FastPass
    from ..calibration.statistics.live import PassOptions, SharedPass
    from ..calibration.text.corpus import Corpus
    from ..convert.checkpoints.checkpoint import Checkpoint


class Passes:
    """Everything is made at the first asking, and given to whoever asks for the same again.

    folder: where streams are kept for a run that continues; None: in the folder of the artifact that asks first.
    """

    def __init__(self, source: Checkpoint, device: str, folder: Path | None = None) -> None:
        self.source, self.device, self.folder = source, device, folder
        self.others = 0  # bytes of the streams that artifacts keep for themselves, beside that of the one which plans
        self._corpora: dict[Hashable, Corpus] = {}
        self._passes: dict[Hashable, SharedPass] = {}
        self._fast: dict[Hashable, FastPass] = {}
        self._references: dict[Hashable, SharedReference] = {}

    def corpus(self, options: TextOptions) -> Corpus:
        """The calibration text of these options, read and packed once."""
        from .corpus import make_corpus

        texts = (options.text, options.evaluation, options.context, options.windows, options.seed, options.text_only)
        if texts not in self._corpora:
            self._corpora[texts] = make_corpus(self.source, options)
        return self._corpora[texts]

    def reference_pass(self, corpus: Corpus, options: PassOptions, folder: Path) -> SharedPass:
        """Statistics of the reference on a text; `folder`: the asking artifact's own place."""
        from ..calibration.statistics.live import LivePass, SharedPass

        key = (_digest(corpus.tokens), options)
        if key not in self._passes:
            place = self._place("statistics", key, folder)
            self._passes[key] = SharedPass(LivePass(self.source, corpus, options, folder=place))
        return self._passes[key]

    def fast_pass(self, tokens: Tensor, folder: Path) -> FastPass:
        """Diagonals of the reference on a text, in the batches of GGUF."""
        from ..calibration.gguf.run_fast import FastPass

        key = _digest(tokens)
        if key not in self._fast:
            self._fast[key] = FastPass(self.source, tokens, self.device, self._place("fast", key, folder))
        return self._fast[key]

    def reference(self, tokens: Tensor, folder: Path) -> SharedReference:
        """The reference's stream on a text, for GGUF files that are corrected against it."""
        from ..calibration.gguf.reference import SharedReference
        from ..calibration.gguf.run import plan_memory
        from ..calibration.model.distributed import rank_shares
        from ..calibration.model.divided import from_owner

        key = _digest(tokens)
        if key not in self._references:
            windows, length = tokens.shape
            most = max(map(len, rank_shares(windows)))
            plan = from_owner(lambda: plan_memory(self.source.geometry, most, length, self.device, self.others))
            shape = (windows, length, self.source.geometry.hidden)
            self._references[key] = SharedReference(shape, plan.place, self._place("reference", key, folder))
        return self._references[key]

    def _place(self, kind: str, key: Hashable, folder: Path) -> Path:
        if self.folder is None:
            return folder
        return self.folder / f"{kind}-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()
