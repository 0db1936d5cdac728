"""Evaluation cases: a tiny reference, a perturbed candidate, and a sample without text."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.tiny import write_tiny
from mmquant.calibration.evaluate import state as evaluation_state
from mmquant.calibration.evaluate.outcomes import Outcome
from mmquant.calibration.evaluate.reference_store import StoredReference
from mmquant.calibration.evaluate.settings import Settings
from mmquant.calibration.evaluate.streamed import evaluate
from mmquant.calibration.model.distributed import current_ranks
from mmquant.calibration.text.sample import Sample
from mmquant.convert.checkpoints.census import Kind
from mmquant.convert.checkpoints.checkpoint import Checkpoint
from mmquant.convert.models.geometry import Geometry
from mmquant.convert.open import open_native

CONTEXT = 12


class Noisy:
    """A checkpoint whose expert weights are off by a relative error, other in each layer; may stop at one of them."""

    def __init__(self, source: Checkpoint, error: float = 0.05, stop_at: int | None = None) -> None:
        self.source, self.error, self.stop_at = source, error, stop_at
        self.geometry: Geometry = source.geometry
        self.config = source.config
        self.label = "noisy"
        self.fingerprint = f"{source.fingerprint} off by {error}"
        self.bytes = source.bytes
        self.read_layers: list[int] = []
        self.origin, self.notes = source.origin, source.notes

    def read(self, name: str) -> Tensor:
        return self.source.read(name)

    def read_experts(
        self, layer: int, projection: str, experts: range, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        if layer == self.stop_at:
            raise ValueError(f"noisy: layer {layer} cannot be read")
        self.read_layers.append(layer)
        whole = self.source.read_experts(layer, projection, range(self.geometry.experts), "cpu", torch.float32)
        noise = torch.randn(whole.shape, generator=torch.Generator().manual_seed(layer))
        return (whole * (1 + self.error * noise))[experts.start : experts.stop].to(device, dtype)

    def small_file(self, name: str) -> bytes | None:
        return self.source.small_file(name)

    def file_names(self) -> Collection[str]:
        return self.source.file_names()

    def ggml_type(self, name: str) -> str | None:
        return self.source.ggml_type(name)

    def validate(self) -> None:
        self.source.validate()

    def census(self) -> list[Kind]:
        return self.source.census()

    def close(self, finished: bool = False) -> None:
        self.source.close(finished)


def make_sample(windows: int = 7, vocab: int = 320, seed: int = 0) -> Sample:
    """Random tokens; two domains, four documents, second half of every other window scored."""
    tokens = torch.randint(0, vocab, (windows, CONTEXT), generator=torch.Generator().manual_seed(seed))
    index = np.arange(windows)
    first = np.where(index % 2 == 1, CONTEXT // 2, 0).astype(np.int64)
    return Sample(tokens, first, index // 2, (index >= windows // 2).astype(np.int64), ("a", "b"), (), "all", CONTEXT)


def small(**changes: Any) -> Settings:
    return Settings(tokens=3 * CONTEXT, **changes)


def one_rank(path: Path, task: str) -> None:
    """One process of a run: `task` is "store", "read", "die" (rank 1 cannot read layer 2) or "resume"."""
    ranks = current_ranks()
    reference = open_native(path / "model")
    candidate = Noisy(reference, stop_at=2 if task == "die" and ranks.rank == 1 else None)
    if task == "read":
        outcomes = evaluate(StoredReference(path / "stored"), [candidate], make_sample(), small(), ranks=ranks)
    else:
        state = path / "state" if task in ("die", "resume") else None
        save = path / "stored" if task == "store" else None
        evaluation_state.EVERY = 0.0
        try:
            outcomes = evaluate(reference, [candidate], make_sample(), small(state=state), ranks=ranks, save=save)
        except Exception as error:  # the other rank dies of it, and may be seen to do so first
            (path / f"died-{ranks.rank}").write_text(str(error))
            raise
    if ranks.rank == 0:
        torch.save(packed(outcomes[0]) | {"layers_read": torch.tensor(candidate.read_layers)}, path / f"{task}.pt")


def packed(outcome: Outcome) -> dict[str, Tensor]:
    scores = outcome.scores
    found = {name: torch.from_numpy(getattr(scores, name).copy()) for name in ("nll", "kld", "same", "shift")}
    return found | ({"layers": torch.stack(outcome.layers)} if outcome.layers else {})


def write_model(folder: Path, **changes: Any) -> Path:
    return write_tiny(folder / "model", **changes)
