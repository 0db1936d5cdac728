"""Summarize a calibration: one summary per layer, and findings over all layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mmquant.tables import percent
from mmquant.tables import table as aligned

from ...quantize.overflow import FP16_MAX
from .layer import MARGIN_BINS, LayerStatistics, effective_rows, outlier_channels, overflowing_experts, sampling_error

BFLOAT16_BIN = MARGIN_BINS - 9  # gaps below 2^-9: what rounding a score near 0.5 to bfloat16 can turn over


@dataclass(frozen=True)
class LayerSummary:
    """One layer in numbers that fit a report; lists run over experts."""

    layer: int
    tokens: list[int]
    load: list[list[int]]  # by domain
    dead: list[int]
    few: list[int]  # fewer tokens than input channels: their second moment is singular
    overflow: list[int]  # down input beyond float16, by value or by block sum
    overflow_channels: int
    amax_in: float
    amax_mid: float
    sum32: float
    outliers_in: list[int]  # channels with more than 100 times the median channel's E[x^2]
    outliers_mid: list[int]
    close_calls: float  # share of tokens whose last chosen expert leads by less than bfloat16 resolves
    nonfinite: int
    saliency: list[float]
    error_in: list[float | None]  # expected relative sampling error of the second moments
    error_mid: list[float | None]

    @property
    def imbalance(self) -> float:
        """Largest load over the mean."""
        return max(self.tokens) / max(sum(self.tokens) / len(self.tokens), 1e-9)


def summarise(found: LayerStatistics, squares: tuple[Tensor, Tensor] | None = None) -> LayerSummary:
    """Summary of one layer; squares: |S|_F^2 of its second moments when those were left on disk."""
    tokens, rows = found.routing.tokens_per_expert, effective_rows(found)
    known = squares if squares is not None else (None, None)
    margins = found.routing.margins
    return LayerSummary(
        layer=found.layer,
        tokens=_ints(tokens),
        load=[_ints(row) for row in found.routing.load],
        dead=torch.nonzero(tokens == 0).flatten().tolist(),
        few=torch.nonzero((tokens > 0) & (tokens < found.expert_in.inputs)).flatten().tolist(),
        overflow=overflowing_experts(found),
        overflow_channels=int((found.mid_amax > FP16_MAX).sum()),
        amax_in=float(found.expert_in.amax.max()),
        amax_mid=float(found.expert_mid.amax.max()),
        sum32=float(found.expert_mid.sum32.max()),
        outliers_in=outlier_channels(found.expert_in.diagonal),
        outliers_mid=outlier_channels(found.expert_mid.diagonal),
        close_calls=float(margins[:BFLOAT16_BIN].sum() / margins.sum().clamp(min=1)),
        nonfinite=int(found.expert_in.nonfinite.sum() + found.expert_mid.nonfinite.sum()),
        saliency=[float(v) for v in found.routing.saliency],
        error_in=_finite(sampling_error(found.expert_in, rows, known[0])),
        error_mid=_finite(sampling_error(found.expert_mid, rows, known[1])),
    )


def _ints(values: Tensor) -> list[int]:
    return [int(v) for v in values.tolist()]


def _finite(values: Tensor) -> list[float | None]:
    return [float(v) if v < float("inf") else None for v in values.tolist()]


def table(layers: list[LayerSummary]) -> list[str]:
    """Two lines per layer: the numbers, then what is unusual."""
    head = ("layer", "tokens/expert", "max/mean", "dead", "few", "sampling err %", "max |x|", "max |h|")
    rows = []
    for s in layers:
        known = sorted(e for e in s.error_in if e is not None)
        error = f"{100 * known[len(known) // 2]:.1f}..{100 * known[-1]:.1f}" if known else None
        overflow = ", ".join(map(str, s.overflow[:6])) + (" ..." if len(s.overflow) > 6 else "")
        outliers = f"{len(s.outliers_in)}+{len(s.outliers_mid)}"
        spread = f"{min(s.tokens)}..{max(s.tokens)}"
        rows.append(
            (
                *(s.layer, spread, f"{s.imbalance:.2f}", len(s.dead), len(s.few), error),
                *(f"{s.amax_in:.4g}", f"{s.amax_mid:.4g}", f"{s.sum32:.4g}"),
                *(overflow or None, outliers, percent(s.close_calls)),
            )
        )
    return aligned((*head, "max |sum32|", "fp16 overflow", "outliers", "close calls %"), rows, text=("fp16 overflow",))


def findings(layers: list[LayerSummary]) -> list[str]:
    """What a user should know, one sentence each."""
    out = []
    for s in layers:
        if s.overflow:
            out.append(
                f"layer {s.layer}: the down input of {_names(s.overflow)} overflows float16 "
                f"(largest sum over 32 channels {s.sum32:.0f}, "
                f"limit {FP16_MAX:.0f}): in GGUF, Q4_K, Q5_K, Q4_1, Q5_1 and Q2_K of ffn_down_exps give NaN on CUDA"
            )
        if s.dead:
            out.append(f"layer {s.layer}: {_names(s.dead)} saw no token; the layer's pooled moments stand in")
        if s.nonfinite:
            out.append(f"layer {s.layer}: {s.nonfinite} rows held NaN or infinity and were left out")
    few = sum(len(s.few) for s in layers)
    if few:
        out.append(f"{few} experts saw fewer tokens than they have input channels; the pooled prior fills the rest")
    return out


def _names(experts: list[int]) -> str:
    if len(experts) == 1:
        return f"expert {experts[0]}"
    shown = experts if len(experts) <= 12 else experts[:12]
    rest = f" and {len(experts) - 12} more" if len(experts) > 12 else ""
    return "experts " + (
        ", ".join(map(str, shown[:-1])) + f" and {shown[-1]}" if not rest else ", ".join(map(str, shown)) + rest
    )


def domain_balance(layers: list[LayerSummary], domains: tuple[str, ...]) -> list[tuple[str, int, float]]:
    """(domain, routed tokens, effective number of experts: exp of the routing entropy, averaged over layers)."""
    out = []
    for index, domain in enumerate(domains):
        loads = torch.tensor([s.load[index] for s in layers], dtype=torch.float64)
        portion = loads / loads.sum(1, keepdim=True).clamp(min=1)
        entropy = -(portion * portion.clamp(min=1e-300).log()).sum(1)
        out.append((domain, int(loads[0].sum()), float(entropy.exp().mean())))
    return out


def as_json(layers: list[LayerSummary], description: dict[str, Any]) -> dict[str, Any]:
    """For --json: the corpus, the findings and every layer."""
    return {"corpus": description, "findings": findings(layers), "layers": [asdict(layer) for layer in layers]}
