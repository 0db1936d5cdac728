"""Collect statistics by fused CUDA kernels: one reading of the rows, one launch for all x^T x."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...convert.models.layer import LayerWeights
from ..model.forward import Routing
from .collect import Collect
from .collector import Collector
from .layer import LayerStatistics
from .sums import Sums, add_gram

if TYPE_CHECKING:
    from .reduce_triton import ColumnSums


def collector_for(weights: LayerWeights, collect: Collect) -> type[Collector]:
    """The `Collector` for where the weights are: fused on CUDA with Triton, plain elsewhere."""
    fused = weights.router.is_cuda and collect.experts == "routed" and importlib.util.find_spec("triton") is not None
    return FusedCollector if fused else Collector


class FusedCollector(Collector):
    """`Collector` for CUDA: the same sums in another order. Batches with non-finite values take the plain path."""

    plain = False

    def moe_input(self, x: Tensor, routing: Routing) -> None:
        """Count the router's choices and keep them for `experts`."""
        from .reduce_triton import column_abs_max

        abs_max = column_abs_max(x)
        self.plain = not bool(torch.isfinite(abs_max).all())
        if self.plain:
            super().moe_input(x, routing)
            return
        self.routing, self.good = routing, None
        self.row_weight = routing.weights if self.collect.weighting == "router" else torch.ones_like(routing.weights)
        if self.first:
            self.router.add(routing, self.token_domain, None)
            torch.maximum(self.hidden_amax, abs_max, out=self.hidden_amax)

    def experts(self, x: Tensor, h: Tensor, y: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
        """Sum what the experts see, and their outputs' norms."""
        if self.plain:
            super().experts(x, h, y, token, slot, offsets)
            return
        from .reduce_triton import column_sums, row_norms, segment_sums

        ends = torch.tensor(offsets, dtype=torch.int32, device=x.device)
        row_weight = self._hold(x, h, self.row_weight[token, slot].contiguous(), offsets)
        full = self.collect.full
        scaled_x, scaled_h = (torch.empty_like(v) if full else None for v in (x, h))
        mid = column_sums(h, row_weight, ends, scaled_h)
        if bool(mid.bad > 0):
            if self.first:
                self._fold(self.expert_in, column_sums(x, row_weight, ends), ends, row_weight)
                self.weight4 += segment_sums(row_weight.square(), ends)[1]
            self._experts(x, h, y, (token, slot, offsets), row_weight)
            return
        wide = column_sums(x, row_weight, ends, scaled_x)
        if self.first:
            self.saliency += segment_sums(row_norms(y) * self.routing.weights[token, slot], ends)[0]
            self.weight4 += segment_sums(row_weight.square(), ends)[1]
            self._fold(self.expert_in, wide, ends, row_weight)
            self._fold(self.expert_mid, mid, ends, row_weight)
            torch.maximum(self.mid_amax, mid.abs_max, out=self.mid_amax)
        if scaled_x is not None and scaled_h is not None:
            self._grams(scaled_x, scaled_h, ends, offsets)

    def statistics(self) -> LayerStatistics:
        """The sums so far, second moments made symmetric."""
        from .reduce_triton import mirror

        for second in (self.expert_in.second, self.expert_mid.second):
            if second is not None:
                mirror(second)
        return super().statistics()

    def _fold(self, sums: Sums, found: ColumnSums, ends: Tensor, row_weight: Tensor) -> None:
        from .reduce_triton import segment_sums

        sums.count += ends.diff()
        sums.weight += segment_sums(row_weight.square(), ends)[0]
        sums.plain += found.plain
        if sums.second is None:
            sums.diagonal += found.weighted
        sums.extremes((found.abs_max.amax(1), found.sum32, found.sum16))

    def _grams(self, x: Tensor, h: Tensor, ends: Tensor, offsets: list[int]) -> None:
        """Second moments of the kept experts from weighted rows."""
        from .reduce_triton import add_grams

        kept = self.kept
        rows = slice(offsets[kept.start], offsets[kept.stop])
        inner = (ends[kept.start : kept.stop + 1] - ends[kept.start]).contiguous()
        for second, values in ((self.expert_in.second, x[rows]), (self.expert_mid.second, h[rows])):
            assert second is not None
            if values.dtype == torch.bfloat16:
                add_grams(second, values, inner)
                continue
            for index, expert in enumerate(kept):
                start, stop = offsets[expert] - rows.start, offsets[expert + 1] - rows.start
                if stop > start:
                    add_gram(second[index], values[start:stop])
