"""The end of an evaluation: next-token distributions of every model, and what they say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...convert.models.layer import Globals
from ..model.distributed import Ranks
from ..model.divided import from_owner
from ..model.forward import final_logits
from ..model.reading import FirstReads
from ..text.sample import Sample
from .metrics import Scores, compare, join_metrics
from .reference_store import StoredReference, StoreWriter, compare_stored
from .settings import Settings
from .subjects import Subject

LOGIT_BYTES = 1 << 30  # float32 logits of one model that may be held at once


@dataclass(frozen=True)
class Outcome:
    """One candidate's scores over all windows in their order, and its loss at each layer.

    layers [5, domains], positions [5, ranges] float64 of every layer; empty where the reference is a file of logits.
    kind, of: as of Subject.
    """

    label: str
    scores: Scores
    layers: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    kind: str = "exact"
    of: int = -1


def finish_subjects(
    subjects: list[Subject],
    stored: StoredReference | None,
    own: Sample,
    settings: Settings,
    writer: StoreWriter | None,
    ranks: Ranks,
    origin: int,
) -> list[Outcome]:
    """Next-token distributions of every subject against the reference's, gathered over the ranks.

    `origin`: scored positions of the whole sample before this rank's first.
    """
    models = [_head(s, settings.device) for s in subjects]
    skip = 0 if stored is not None else 1
    scores: list[list[Scores]] = [[] for _ in subjects[skip:]]
    rows = max(1, LOGIT_BYTES // (4 * subjects[0].source.geometry.vocab))
    at = origin
    for window in range(own.windows):
        for first in range(int(own.first[window]), own.context - 1, rows):
            stop = min(first + rows, own.context - 1)
            target = own.tokens[window, first + 1 : stop + 1]
            pairs = zip(subjects, models, strict=True)
            blocks = [_logits(s, m, window, first, stop, settings) for s, m in pairs]
            if stored is not None:
                base = stored.rows(at, at + stop - first)
                found = [compare_stored(base, block, target) for block in blocks]
            else:
                found = [compare(blocks[0], block, target) for block in blocks[1:]]
                if writer is not None:
                    writer.add(blocks[0], target)
            at += stop - first
            for kept, part in zip(scores, found, strict=True):
                kept.append(part)
    domains = len(own.domains)
    outcomes = []
    for subject, part in zip(subjects[skip:], scores, strict=True):
        found = _gathered(subject, part, ranks, domains)
        outcomes += [found, *(replace(found, kind=name) for name in subject.also)]
    return sorted(outcomes, key=lambda outcome: (outcome.of < 0, outcome.kind != "exact"))  # stable


def _head(subject: Subject, device: str) -> Globals:
    """Final norm and head; the embeddings are not needed again."""
    source, dtype = subject.source, subject.dtype
    names = source.geometry.names

    def read() -> tuple[Tensor, Tensor]:
        return source.read(names.final_norm), source.read(names.head).to(dtype)

    # One rank's host memory holds the head in float32 on its way, not every rank's.
    norm, head = from_owner(read) if not isinstance(source, FirstReads) else read()
    return Globals(embed=norm[:0], norm=norm.to(device), head=head.to(device))


def _logits(subject: Subject, model: Globals, window: int, first: int, stop: int, settings: Settings) -> Tensor:
    hidden = subject.hidden.all()[window, first:stop].to(settings.device)
    return final_logits(model, subject.source.geometry, hidden, subject.head())


def _gathered(subject: Subject, scores: list[Scores], ranks: Ranks, domains: int) -> Outcome:
    parts = ranks.gather((join_metrics(scores) if scores else None, subject.layers))
    layers = [torch.stack(found).sum(0) for found in zip(*(part[1] for part in parts), strict=True)]
    joined = join_metrics([part[0] for part in parts if part[0] is not None])
    by_domain, by_position = [loss[:, :domains] for loss in layers], [loss[:, domains:] for loss in layers]
    return Outcome(subject.label, joined, by_domain, by_position, subject.kind, subject.of)
