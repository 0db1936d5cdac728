"""The collector with fused CUDA kernels: routed rows are read once for all sums, x^T x of all experts in one launch."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from .collector import Collector
from .forward import Routing
from .sums import Sums, add_gram


def make_collector(*args: Any, **kwargs: Any) -> Collector:
    """A `Collector` for where the weights are: fused on CUDA with Triton, plain elsewhere."""
    weights, collect = args[1], args[3]
    fused = weights.router.is_cuda and collect.experts == "routed" and importlib.util.find_spec("triton") is not None
    return (FusedCollector if fused else Collector)(*args, **kwargs)


class FusedCollector(Collector):
    """`Collector` for CUDA: the same sums in another order. Batches with non-finite values take the plain path."""

    plain = False

    def moe_input(self, x: Tensor, routing: Routing) -> None:
        peak = torch.linalg.vector_norm(x, torch.inf, dim=0, dtype=torch.float32)
        self.plain = not bool(torch.isfinite(peak).all())
        if self.plain:
            super().moe_input(x, routing)
            return
        self.routing, self.good = routing, None
        self.share = routing.weights if self.collect.weighting == "router" else torch.ones_like(routing.weights)
        if self.first:
            self._router(routing, None)
            torch.maximum(self.hidden_amax, peak, out=self.hidden_amax)

    def experts(self, x: Tensor, h: Tensor, y: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
        if self.plain:
            super().experts(x, h, y, token, slot, offsets)
            return
        from ..quantize.moments_triton import column_sums, segment_sums

        ends = torch.tensor(offsets, dtype=torch.int32, device=x.device)
        share = self.share[token, slot].contiguous()
        if self.first:
            mid = column_sums(h, share, ends)
            if bool(mid.bad > 0):
                self._token_level_of_rows(x, share, ends)
                self._plain_mid(x, h, y, token, slot, offsets)
                return
            norm = torch.linalg.vector_norm(y, dim=1, dtype=torch.float32)
            self.saliency += segment_sums(norm * self.routing.weights[token, slot], ends)[0]
            count, (weight, _) = ends.diff().float(), segment_sums(share.square(), ends)
            self._token_level_of_rows(x, share, ends)
            self._fold(self.expert_mid, mid, count, weight)
            torch.maximum(self.mid_amax, mid.peak, out=self.mid_amax)
        self._grams(x, h, share, ends, offsets)

    def _token_level_of_rows(self, x: Tensor, share: Tensor, ends: Tensor) -> None:
        from ..quantize.moments_triton import column_sums, segment_sums

        weight, weight4 = segment_sums(share.square(), ends)
        self.weight4 += weight4
        self._fold(self.expert_in, column_sums(x, share, ends), ends.diff().float(), weight)

    def _plain_mid(self, x: Tensor, h: Tensor, y: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
        super().experts(x, h, y, token, slot, offsets)

    def _fold(self, sums: Sums, found: Any, count: Tensor, weight: Tensor) -> None:
        sums.count += count
        sums.weight += weight
        sums.plain += found.plain
        if sums.second is None:
            sums.diagonal += found.weighted
        sums.extremes((found.peak.amax(1), found.sum32, found.sum16))

    def _grams(self, x: Tensor, h: Tensor, share: Tensor, ends: Tensor, offsets: list[int]) -> None:
        from ..quantize.moments_triton import add_grams, scale_rows

        kept = self.kept
        rows = slice(offsets[kept.start], offsets[kept.stop])
        inner = (ends[kept.start : kept.stop + 1] - ends[kept.start]).contiguous()
        for second, values in ((self.expert_in.second, x), (self.expert_mid.second, h)):
            if second is None:
                continue
            scaled = scale_rows(values[rows], share[rows])
            if scaled.dtype == torch.bfloat16:
                add_grams(second, scaled, inner)
                continue
            for index in range(len(kept)):
                start, stop = offsets[kept.start + index] - rows.start, offsets[kept.start + index + 1] - rows.start
                if stop > start:
                    add_gram(second[index], scaled[start:stop])
