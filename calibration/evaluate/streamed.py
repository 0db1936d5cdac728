"""Evaluate a reference and any number of candidates in one pass, layer by layer.

The layer of the reference and of each candidate is read in turn, applied to all windows and dropped, so memory is that
of one layer plus hidden states. After each layer the candidate's hidden state and chosen experts are compared with the
reference's, which says where a variant loses; after the last, its next-token distributions (metrics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import InputError

from ...convert.models.layer import Globals, LayerWeights
from ...convert.source import Source
from ..model.distributed import Ranks
from ..model.divided import from_owner
from ..model.embedded import embedded
from ..model.engine_like import Like, like_of
from ..model.forward import Observer, Routing, final_logits, layer_forward
from ..model.hidden import RAM_LIMIT, HiddenStates, leaving, place_of
from ..model.reading import FirstReads, read_layer_shared
from ..text.sample import Sample
from ..text.vocabulary import check_same_model
from .floors import ShuffledSums, window_order
from .metrics import Scores, compare, join_metrics
from .reference_store import StoredReference, StoreWriter, compare_stored
from .state import State
from .subjects import Subject, note, recast

LOGIT_BYTES = 1 << 30  # float32 logits of one model that may be held at once


@dataclass(frozen=True)
class Settings:
    """How to run: `tokens` a batch; hidden states beyond `ram_limit` bytes go to a file in `folder`."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    tokens: int = 8192
    ram_limit: int = RAM_LIMIT
    folder: Path | None = None
    state: Path | None = None  # where an interrupted run leaves what it has
    floor: bool = False  # the reference against itself in the other compute dtype
    floor_seeds: int = 0  # and with sums in other orders, so many times
    floor_orders: int = 0  # and with windows in other orders and batches, so many times
    activations: str = "exact"  # or "llama.cpp": rounded as its CPU backend does (needs float32), of every model
    likes: tuple[Like, ...] = ()  # each candidate also as these engines compute it (needs float32)

    @property
    def other_dtype(self) -> torch.dtype:
        """The compute dtype that the floor is measured in."""
        return torch.bfloat16 if self.dtype == torch.float32 else torch.float32


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


class _Choice(Observer):
    """Remembers which experts the last batch chose."""

    chosen: Tensor

    def moe_input(self, x: Tensor, routing: Routing) -> None:
        self.chosen = routing.chosen


def evaluate(
    reference: Source | StoredReference,
    candidates: list[Source],
    sample: Sample,
    settings: Settings | None = None,
    *,
    ranks: Ranks | None = None,
    save: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Scores of each candidate, then of each as engines compute it, then of the noise floors; whole on every rank.

    `save` stores the reference's distributions for later runs. Raises ValueError for candidates of another model, token
    ids outside the vocabulary, and a stored reference that was made of something else.
    """
    scoring = Scoring(reference, candidates, sample, settings, ranks=ranks)
    layers = scoring.geometry.layers
    for layer in range(scoring.begin(), layers):
        scoring.advance(layer)
        if progress is not None:
            progress(layer + 1, layers)
    return scoring.finish(save)


class Scoring:
    """An evaluation on its way, one layer at a time: `begin`, `advance` through every layer, `finish`.

    identity: names the candidates where their fingerprints are not known yet (they are still being written).
    """

    def __init__(
        self,
        reference: Source | StoredReference,
        candidates: list[Source],
        sample: Sample,
        settings: Settings | None = None,
        *,
        ranks: Ranks | None = None,
        identity: str | None = None,
    ) -> None:
        self.settings, self.ranks, self.sample = settings or Settings(), ranks or Ranks(), sample
        self.stored = reference if isinstance(reference, StoredReference) else None
        self.source = None if isinstance(reference, StoredReference) else reference
        self.geometry = (candidates[0] if self.source is None else self.source).geometry
        for candidate in candidates:
            check_same_model(self.geometry, candidate)
        if int(sample.tokens.max()) >= self.geometry.vocab:
            highest = int(sample.tokens.max())
            raise InputError(f"tokens: id {highest}, the model's vocabulary has {self.geometry.vocab}")
        share = self.ranks.share(sample.windows)
        self.own, self.origin = sample.part(share), int(sample.scored[: share.start].sum())
        self.subjects = _subjects(self.source, candidates, self.own, self.settings)
        name = identity or _identity(self.subjects, sample)
        self.state = State.open(self.settings.state, f"{self.settings.activations} {name}", self.ranks)

    def begin(self) -> int:
        """Embed all windows, or take up what an interrupted run left; the layer to do first."""
        return _start(self.subjects, self.own, self.settings, self.state, self.ranks)

    def advance(self, layer: int) -> None:
        """Move every model through one layer."""
        _advance(self.subjects, self.source is not None, layer, self.own, self.settings)
        subjects = self.subjects
        self.state.offer(layer + 1, [s.hidden for s in subjects], [s.layers for s in subjects], self.ranks)

    def finish(self, save: Path | None = None, keep: bool = False) -> list[Outcome]:
        """The scores; `save` as of `evaluate`. keep: what an interrupted run goes on from stays until `forget`."""
        writer = StoreWriter(save, self.ranks) if save is not None and self.source is not None else None
        outcomes = _finish(self.subjects, self.stored, self.own, self.settings, writer, self.ranks, self.origin)
        if writer is not None and self.source is not None:
            writer.close(self.source, self.sample, self.settings.activations)
        if not keep:
            self.forget()
        return outcomes

    def forget(self) -> None:
        """Delete what an interrupted run would go on from."""
        self.state.clear(self.ranks)


def _subjects(source: Source | None, candidates: list[Source], own: Sample, settings: Settings) -> list[Subject]:
    chosen = models_of(source, candidates, own, settings)
    limit = settings.ram_limit // max(1, len(chosen))
    shape = (own.windows, own.context)
    place = place_of(settings.device, 4 * own.tokens.numel() * sum(one["source"].geometry.hidden for one in chosen))
    return [
        Subject(hidden=HiddenStates(*shape, one["source"].geometry.hidden, limit, settings.folder, place), **one)
        for one in chosen
    ]


def models_of(source: Source | None, candidates: list[Source], own: Sample, settings: Settings) -> list[dict[str, Any]]:
    """The models that go through the layers together, as a Subject's fields: first the reference, if it is live."""
    every = None if settings.activations == "exact" else like_of(settings.activations)
    chosen: list[dict[str, Any]] = []
    if source is not None:
        chosen.append({"label": source.label, "source": source, "like": every})
        chosen += [{"source": source, **one} for one in _floors(own, settings)]
    for number, candidate in enumerate(candidates):
        one = {"label": candidate.label, "source": candidate, "of": number}
        chosen.append({**one, "like": every})
        chosen += [{**one, **like} for like in _likes(candidate, settings.likes)]
    return [{"dtype": settings.dtype, "kind": "exact", "like": None, **one} for one in chosen]


def _likes(candidate: Source, likes: tuple[Like, ...]) -> list[dict[str, Any]]:
    """The engines that open a candidate; those that compute it alike as one."""
    alike: dict[tuple[str, ...], list[Like]] = {}
    for like in likes:
        if like.opens(candidate):
            alike.setdefault(like.same_as(candidate), []).append(like)
    return [
        {"like": first, "kind": first.name, "also": tuple(like.name for like in others)}
        for first, *others in alike.values()
    ]


def _floors(own: Sample, settings: Settings) -> Iterator[dict[str, Any]]:
    """What the reference is run as again: another dtype, sums in other orders, windows in other orders."""
    if settings.floor:
        name = str(settings.other_dtype).removeprefix("torch.")
        yield {"label": "noise floor", "kind": f"floor: {name}", "dtype": settings.other_dtype}
    for seed in range(1, settings.floor_seeds + 1):
        label = f"noise floor, sums {seed}"
        yield {"label": label, "kind": f"floor: order of sums, seed {seed}", "like": ShuffledSums(seed)}
    for number in range(1, settings.floor_orders + 1):
        label, kind = f"noise floor, batches {number}", f"floor: order and size of batches, {number}"
        yield {"label": label, "kind": kind, "order": window_order(own.windows, number)}


def _identity(subjects: list[Subject], sample: Sample) -> str:
    return " ".join([sample.fingerprint(), *(f"{s.source.fingerprint}/{s.dtype}/{s.kind}" for s in subjects)])


def _start(subjects: list[Subject], own: Sample, settings: Settings, state: State, ranks: Ranks) -> int:
    """Embed all windows, or take up the hidden states of an interrupted run; returns the first layer to do."""
    layer = state.resume([s.hidden for s in subjects], [s.layers for s in subjects], ranks)
    if layer:
        return layer
    for subject in subjects:
        step = max(1, settings.tokens // own.context)
        for start, values in embedded(subject.source, own.tokens, step):
            subject.hidden.put(start, values.to(subject.dtype).float())
    return 0


def _advance(subjects: list[Subject], has_reference: bool, layer: int, own: Sample, settings: Settings) -> None:
    """Move every subject through one layer and note what each lost against the first."""
    chosen: list[Tensor] = []  # of the reference, [T, K] of every window
    read: tuple[Source, LayerWeights] | None = None
    columns = own.domain, len(own.domains) + own.range_of(np.arange(own.context))
    for number, subject in enumerate(subjects):
        if read is None or read[0] is not subject.source:
            read = subject.source, _read(subject, layer, settings)
        weights = subject.weights(layer, read[1] if subject.dtype == settings.dtype else recast(read[1], subject.dtype))
        rounding, watch = subject.rounding(layer), _Choice()
        loss = torch.zeros(5, len(own.domains) + len(own.ranges), dtype=torch.float64)
        is_truth = has_reference and number == 0
        for index, values in subject.batches(_at_once(subject, own, settings), settings.device):
            after = layer_forward(weights, subject.source.geometry, values, watch, rounding)
            # A candidate's are counted, and fail the gate; against a reference that is not finite nothing is measured.
            subject.put(index, after, leaving(subject.label, layer) if is_truth else None)
            if is_truth:
                chosen += watch.chosen.to(torch.int16).unflatten(0, (len(after), -1))
            elif has_reference:
                truth = subjects[0].hidden.all()[index.to(subjects[0].hidden.all().device)].to(after.device)
                same = subject.source.geometry.experts == subjects[0].source.geometry.experts
                before = torch.cat([chosen[i] for i in index.tolist()]) if same else None
                note(loss, truth, after, before, watch.chosen, (columns[0][index.numpy()], columns[1]))
        if number and has_reference:
            subject.layers.append(loss)
        del weights


def _read(subject: Subject, layer: int, settings: Settings) -> LayerWeights:
    return read_layer_shared(subject.source, layer, settings.device, settings.dtype)


def _at_once(subject: Subject, own: Sample, settings: Settings) -> int:
    """Windows of a batch; a floor of other batches has others."""
    windows = max(1, settings.tokens // own.context)
    return windows if subject.order is None else max(1, windows // 2 + 1 if windows > 2 else 3 - windows)


def _finish(
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
