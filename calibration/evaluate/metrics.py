"""Metrics of a candidate against its reference, per position and over a sample, with uncertainty.

Per scored position: negative log-likelihood of both, Kullback-Leibler divergence KL(reference || variant) in nats,
whether the most probable token is the same, and the change of the next token's probability. All sums run in float64;
a position whose logits are not finite is counted, and never averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmquant.errors import InputError

# Bytes of one float64 block of log-probabilities; rows of the vocabulary are taken in blocks of this size.
BLOCK_BYTES = 256 << 20
RESAMPLES = 2000
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """One row per scored position; float64 but for the flags."""

    nll: Floats
    nll_reference: Floats
    kld: Floats
    shift: Floats  # probability of the true next token, variant minus reference
    same: NDArray[np.bool_]  # the most probable token agrees
    finite: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.nll)

    def take(self, rows: NDArray[Any]) -> Scores:
        """The positions at `rows` (indices or mask)."""
        return Scores(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def join_metrics(parts: list[Scores]) -> Scores:
    """Scores of several batches, one after the other."""
    names = list(Scores.__dataclass_fields__)
    return Scores(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def compare(reference: Tensor, logits: Tensor, target: Tensor) -> Scores:
    """Scores of `logits` [n, V] against `reference` [n, V] (logits too), `target` [n] int64 being the true next tokens.

    Raises ValueError for shapes that differ and for a reference that is not finite.
    """
    if reference.shape != logits.shape:
        raise InputError(f"vocabularies differ: reference {reference.shape[-1]}, candidate {logits.shape[-1]}")
    rows = max(1, BLOCK_BYTES // (8 * logits.shape[-1]))
    parts = [
        _compare(reference[i : i + rows], logits[i : i + rows], target[i : i + rows])
        for i in range(0, len(target), rows)
    ]
    return join_metrics(parts)


def _compare(reference: Tensor, logits: Tensor, target: Tensor) -> Scores:
    base = log_softmax(reference)
    if not bool(torch.isfinite(base).all()):
        bad = int((~torch.isfinite(base).all(-1)).sum())
        raise InputError(f"reference: logits of {bad} of {len(base)} positions are not finite, nothing to compare with")
    finite = torch.isfinite(logits).all(-1)
    candidate = log_softmax(torch.where(finite[:, None], logits, torch.zeros_like(logits)))
    kld = (base.exp() * (base - candidate)).sum(-1).clamp_(min=0)
    at = target.to(base.device)[:, None]
    nll, nll_reference = -candidate.gather(1, at)[:, 0], -base.gather(1, at)[:, 0]
    shift = torch.exp(-nll) - torch.exp(-nll_reference)
    same = reference.argmax(-1) == logits.argmax(-1)
    return Scores(*(t.cpu().numpy() for t in (nll, nll_reference, kld, shift, same & finite, finite)))


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities over the last axis, in float64 (float32 where a device has no float64)."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    return torch.log_softmax(logits.to(wide), -1)


def bootstrap_weights(units: int, seed: int, resamples: int = RESAMPLES) -> NDArray[np.int64]:
    """How often each of `units` documents is drawn in each resample: [resamples, units]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(units, np.full(units, 1.0 / units), size=resamples)


def interval(values: Floats, unit: NDArray[np.int64], seed: int) -> list[float] | None:
    """95 % bootstrap interval of the mean of `values`, resampling whole units (documents); None for fewer than two."""
    names, index = np.unique(unit, return_inverse=True)
    if len(names) < 2:
        return None
    sums = np.bincount(index, values, len(names))
    counts = np.bincount(index, minlength=len(names))
    weights = bootstrap_weights(len(names), seed)
    means = (weights @ sums) / (weights @ counts)
    low, high = np.quantile(means, (0.025, 0.975))
    return [float(low), float(high)]


def _error(values: Floats) -> float:
    """Standard error of the mean, positions taken as independent (llama-perplexity's)."""
    return float(values.std() / np.sqrt(len(values) - 1)) if len(values) > 1 else 0.0


def summarise(scores: Scores, unit: NDArray[np.int64], seed: int = 0) -> dict[str, Any]:
    """The numbers of `eval --json` for one set of positions; `unit` [n] names each position's document.

    Where no position is finite every average is None.
    """
    whole = {"tokens": len(scores), "nonfinite": int((~scores.finite).sum())}
    kept, unit = scores.take(scores.finite), unit[scores.finite]
    if not len(kept):
        empty = dict.fromkeys([*QUANTILES, "mean", "max", "stderr", "mean_ci95"])
        return whole | dict.fromkeys(["ppl", "ppl_stderr", "ppl_reference", "ppl_ratio", "top1", "shift_rms"]) | {
            "ppl_ratio_stderr": None, "ppl_ratio_ci95": None, "kld": empty,
        }  # fmt: skip
    ratio = kept.nll - kept.nll_reference
    ppl, ppl_ratio = float(np.exp(kept.nll.mean())), float(np.exp(ratio.mean()))
    ratio_interval = interval(ratio, unit, seed)
    quantiles = np.quantile(kept.kld, list(QUANTILES.values()))
    return whole | {
        "ppl": ppl,
        "ppl_stderr": ppl * _error(kept.nll),
        "ppl_reference": float(np.exp(kept.nll_reference.mean())),
        "ppl_ratio": ppl_ratio,
        "ppl_ratio_stderr": ppl_ratio * _error(ratio),
        "ppl_ratio_ci95": None if ratio_interval is None else [float(np.exp(v)) for v in ratio_interval],
        "kld": {
            "mean": float(kept.kld.mean()),
            "stderr": _error(kept.kld),
            **{name: float(value) for name, value in zip(QUANTILES, quantiles, strict=True)},
            "max": float(kept.kld.max()),
            "mean_ci95": interval(kept.kld, unit, seed),
        },
        "top1": float(kept.same.mean()),
        "shift_rms": float(np.sqrt((kept.shift**2).mean())),
    }


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Overlap of two choices of experts [N, K] (each without repeats): |both| / |either|, [N] float32."""
    both = (first[:, :, None] == second[:, None, :]).any(-1).sum(-1).float()
    return both / (2 * first.shape[1] - both)
