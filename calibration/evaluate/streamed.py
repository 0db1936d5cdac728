"""Evaluate a reference and any number of candidates in one pass, layer by layer.

The layer of the reference and of each candidate is read in turn, applied to all windows and dropped, so memory is that
of one layer plus hidden states. After each layer the candidate's hidden state and chosen experts are compared with the
reference's, which says where a variant loses; after the last, its next-token distributions (metrics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mmquant.errors import InputError

from ...convert.models.layer import Globals, LayerWeights
from ...convert.source import Source
from ..model.distributed import Ranks, read_layer_shared
from ..model.forward import EXACT, Observer, Routing, embed, final_logits, layer_forward
from ..model.hidden import RAM_LIMIT, HiddenStates, leaving, place_of
from ..model.llamacpp_activations import as_converted, head_rounding, layer_rounding
from ..text.sample import Sample
from ..text.vocabulary import check_same_model
from .metrics import Scores, compare, jaccard, join_metrics
from .reference_store import StoredReference, StoreWriter, compare_stored
from .state import State

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
    activations: str = "exact"  # or "llama.cpp": rounded as its CPU backend does (needs float32)

    @property
    def like_llama(self) -> bool:
        """Whether activations are rounded as llama.cpp rounds them."""
        return self.activations == "llama.cpp"

    @property
    def other_dtype(self) -> torch.dtype:
        """The compute dtype that the floor is measured in."""
        return torch.bfloat16 if self.dtype == torch.float32 else torch.float32


# Rows of a layer's loss, each a sum over the tokens of a domain: squared error of the hidden state, squares of the
# reference's, overlap of the chosen experts, tokens counted, tokens with a value that is not finite.
ERROR, ENERGY, OVERLAP, TOKENS, NONFINITE = range(5)


@dataclass(frozen=True)
class Outcome:
    """One candidate's scores over all windows in their order, and its loss [5, domains] float64 at each layer.

    `layers` is empty where the reference is a file of logits.
    """

    label: str
    scores: Scores
    layers: list[Tensor] = field(default_factory=list)


@dataclass
class _Subject:
    """A model on its way through the layers: the reference, a candidate, or the reference in another dtype."""

    label: str
    source: Source
    dtype: torch.dtype
    hidden: HiddenStates
    layers: list[Tensor] = field(default_factory=list)


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
    """Scores of each candidate (and, last, of the noise floor if asked for); whole on every rank.

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


def _subjects(source: Source | None, candidates: list[Source], own: Sample, settings: Settings) -> list[_Subject]:
    chosen = [(source.label, source, settings.dtype)] if source is not None else []
    chosen += [(candidate.label, candidate, settings.dtype) for candidate in candidates]
    if settings.floor and source is not None:
        chosen.append(("noise floor", source, settings.other_dtype))
    limit = settings.ram_limit // max(1, len(chosen))
    shape = (own.windows, own.context)
    place = place_of(settings.device, 4 * own.tokens.numel() * sum(model.geometry.hidden for _, model, _ in chosen))
    return [
        _Subject(label, model, dtype, HiddenStates(*shape, model.geometry.hidden, limit, settings.folder, place))
        for label, model, dtype in chosen
    ]


def _identity(subjects: list[_Subject], sample: Sample) -> str:
    return " ".join([sample.fingerprint(), *(f"{s.source.fingerprint}/{s.dtype}" for s in subjects)])


def _start(subjects: list[_Subject], own: Sample, settings: Settings, state: State, ranks: Ranks) -> int:
    """Embed all windows, or take up the hidden states of an interrupted run; returns the first layer to do."""
    layer = state.resume([s.hidden for s in subjects], [s.layers for s in subjects], ranks)
    if layer:
        return layer
    for subject in subjects:
        table = subject.source.read(subject.source.geometry.names.embed).to(subject.dtype)
        model = Globals(embed=table, norm=table[:0], head=table[:0])
        for start, tokens in _batches(own.tokens, settings.tokens):
            subject.hidden.put(start, embed(model, tokens))
    return 0


def _batches(tokens: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    step = max(1, size // tokens.shape[1])
    for start in range(0, len(tokens), step):
        yield start, tokens[start : start + step]


def _advance(subjects: list[_Subject], has_reference: bool, layer: int, own: Sample, settings: Settings) -> None:
    """Move every subject through one layer and note what each lost against the first."""
    chosen: list[Tensor] = []  # of the reference, one tensor a batch
    kept: LayerWeights | None = None
    for number, subject in enumerate(subjects):
        weights = kept if subject.dtype != settings.dtype else None
        if weights is None:
            weights = read_layer_shared(subject.source, layer, settings.device, subject.dtype)
            weights = as_converted(subject.source, weights) if settings.like_llama else weights
        else:
            weights = _recast(weights, subject.dtype)
        rounding = layer_rounding(subject.source, layer) if settings.like_llama else EXACT
        watch, loss = _Choice(), torch.zeros(5, len(own.domains), dtype=torch.float64)
        step = max(1, settings.tokens // own.context)
        for index, (start, values) in enumerate(subject.hidden.batches(step, settings.device)):
            after = layer_forward(weights, subject.source.geometry, values, watch, rounding)
            # A candidate's are counted, and fail the gate; against a reference that is not finite nothing is measured.
            subject.hidden.put(start, after, leaving(subject.label, layer) if has_reference and number == 0 else None)
            if has_reference and number == 0:
                chosen.append(watch.chosen.to(torch.int16))
            elif has_reference:
                truth = subjects[0].hidden.all()[start : start + len(after)].to(after.device)
                same = subject.source.geometry.experts == subjects[0].source.geometry.experts
                before = chosen[index] if same else None
                _note(loss, truth, after, before, watch.chosen, own.domain[start : start + len(after)])
        if number and has_reference:
            subject.layers.append(loss)
        for_floor = has_reference and number == 0 and settings.floor
        kept = weights if for_floor else kept
        del weights


def _recast(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    plain = ("input_norm", "post_norm", "q_norm", "k_norm", "router", "router_bias")
    names = (name for name in LayerWeights.__dataclass_fields__ if name not in plain)
    return replace(weights, **{name: getattr(weights, name).to(dtype) for name in names})


def _note(loss: Tensor, truth: Tensor, after: Tensor, before: Tensor | None, chosen: Tensor, domain: ArrayLike) -> None:
    """Add one batch [B, T, H] to a layer's loss; tokens that are not finite are counted, and weigh nothing."""
    finite = torch.isfinite(after).all(-1)  # [B, T]
    keep = finite.unsqueeze(-1)
    overlap = (
        torch.full_like(finite, torch.nan, dtype=torch.float32)  # a pruned model's experts have other numbers
        if before is None
        else jaccard(before.to(chosen.device), chosen.to(torch.int16)).view(finite.shape)
    )
    parts = {
        ERROR: torch.where(keep, after - truth, 0.0).pow(2).sum(-1),
        ENERGY: torch.where(keep, truth, 0.0).pow(2).sum(-1),
        OVERLAP: torch.where(finite, overlap, 0.0),
        TOKENS: finite,
        NONFINITE: ~finite,
    }
    where = torch.as_tensor(domain)
    for row, values in parts.items():
        loss[row].index_add_(0, where, values.sum(1, dtype=torch.float64).cpu())


def _finish(
    subjects: list[_Subject],
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
    return [_gathered(s, part, ranks) for s, part in zip(subjects[skip:], scores, strict=True)]


def _head(subject: _Subject, device: str) -> Globals:
    """Final norm and head; the embeddings are not needed again."""
    names = subject.source.geometry.names
    norm = subject.source.read(names.final_norm).to(device)
    return Globals(embed=norm[:0], norm=norm, head=subject.source.read(names.head).to(subject.dtype).to(device))


def _logits(subject: _Subject, model: Globals, window: int, first: int, stop: int, settings: Settings) -> Tensor:
    hidden = subject.hidden.all()[window, first:stop].to(settings.device)
    rounding = head_rounding(subject.source) if settings.like_llama else EXACT
    return final_logits(model, subject.source.geometry, hidden, rounding)


def _gathered(subject: _Subject, scores: list[Scores], ranks: Ranks) -> Outcome:
    parts = ranks.gather((join_metrics(scores) if scores else None, subject.layers))
    layers = [torch.stack(found).sum(0) for found in zip(*(part[1] for part in parts), strict=True)]
    return Outcome(subject.label, join_metrics([part[0] for part in parts if part[0] is not None]), layers)
