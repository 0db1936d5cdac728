"""Evaluate a reference and any number of candidates in one pass, layer by layer.

The layer of the reference and of each candidate is read in turn, applied to all windows and dropped, so memory is that
of one layer plus hidden states. After each layer the candidate's hidden state and chosen experts are compared with the
reference's, which says where a variant loses; after the last, its next-token distributions (metrics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import InputError

from ...convert.models.layer import LayerWeights
from ...convert.source import Source
from ..model.distributed import Ranks
from ..model.embedded import embedded
from ..model.engine_like import Like, like_of
from ..model.forward import Observer, Routing, layer_forward
from ..model.hidden import HiddenStates, leaving, place_of
from ..model.reading import read_layer_shared
from ..text.sample import Sample
from ..text.vocabulary import check_same_model
from .floors import ShuffledSums, window_order
from .outcomes import Outcome, finish_subjects
from .reference_store import StoredReference, StoreWriter
from .settings import Settings
from .state import State
from .subjects import Subject, note, recast


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
        outcomes = finish_subjects(self.subjects, self.stored, self.own, self.settings, writer, self.ranks, self.origin)
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
