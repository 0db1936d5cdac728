"""Sum statistics during a forward pass, in fixed order and without atomics: equal runs give equal bits.

Token-level quantities (the experts' input) are computed once per token, not once per routed row; per-expert sums of
them are products with the routing matrix [N, E]. Only down's input is read row by row.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mmquant.errors import InputError
from mmquant.stages import stage

from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ..model.forward import Observer, Routing
from .collect import Collect
from .held import HeldRows
from .layer import LayerStatistics, RoutingStatistics
from .router_sums import RouterSums
from .sums import Sums, abs_max, add_gram, column_squares, expanded, owners, row_extremes, scaled_rows, spread


class Collector(Observer):
    """Sums the statistics of one layer over the batches of a pass.

    `kept` limits the experts whose second moments this pass sums (the others need another pass); `first` is False for
    such further passes, which sum nothing else. `hold`: some rows are left out of the sums (held.py), which are routed
    and full then.
    """

    def __init__(
        self,
        layer: int,
        weights: LayerWeights,
        geometry: Geometry,
        collect: Collect,
        domains: int,
        kept: range | None = None,
        first: bool = True,
        hold: bool = False,
    ) -> None:
        g, device = geometry, weights.router.device
        self.layer, self.weights, self.geometry, self.collect = layer, weights, geometry, collect
        self.first, self.kept = first, range(g.experts) if kept is None else kept
        self.shared = collect.experts == "all"  # one moment of the experts' input serves them all
        full, every = collect.full, range(1)
        self.attention_in = Sums(1, g.hidden, full and first, every, device)
        self.attention_out = Sums(1, g.heads * g.head_dim, full and first, every, device)
        self.expert_in = Sums(
            1 if self.shared else g.experts, g.hidden, full, every if self.shared else self.kept, device
        )
        self.expert_mid = Sums(g.experts, g.expert_width, full, self.kept, device)
        self.held: dict[str, HeldRows] = {}
        if hold and full and not self.shared:
            sizes = {"attention_in": g.hidden, "attention_out": g.heads * g.head_dim}
            self.held = {name: HeldRows.empty(1, {"x": n}, device) for name, n in sizes.items()}
            self.held["experts"] = HeldRows.empty(g.experts, {"x": g.hidden, "h": g.expert_width}, device)
        self.router = RouterSums(domains, g.experts, weights.router_bias, device)
        self.saliency = torch.zeros(g.experts, device=device)
        self.weight4 = torch.zeros(g.experts, device=device)
        self.hidden_amax = torch.zeros(g.hidden, device=device)
        self.mid_amax = torch.zeros(g.experts, g.expert_width, device=device)
        self.kv_amax = torch.zeros(2, g.kv_heads * g.head_dim, device=device)

    def begin(self, window: int, length: int, domains: Tensor) -> None:
        """The coming batch: number of its first window, tokens per window, domain [B] of each window."""
        self.window, self.length = window, length
        self.token_domain = domains.to(self.saliency.device).repeat_interleave(length)

    # attention

    def attention_input(self, x: Tensor) -> None:
        """Sum what q, k and v see."""
        if self.first:
            with stage("moments"):
                self._single(self.attention_in, x, "input of q, k, v", self.held.get("attention_in"))

    def keys_values(self, k: Tensor, v: Tensor) -> None:
        """Keep the largest magnitudes that a KV cache stores."""
        if self.first:
            for place, x in enumerate((k, v)):
                largest = torch.linalg.vector_norm(x, torch.inf, dim=(0, 2), dtype=torch.float32).flatten()
                # What is not finite is found where attention's output is read; here it must not hide the rest.
                torch.maximum(self.kv_amax[place], largest.nan_to_num(0.0, 0.0), out=self.kv_amax[place])

    def attention_output(self, x: Tensor) -> None:
        """Sum what o sees."""
        if self.first:
            with stage("moments"):
                self._single(self.attention_out, x, "input of o_proj", self.held.get("attention_out"))

    def _single(self, sums: Sums, x: Tensor, what: str, held: HeldRows | None = None) -> None:
        """Rows that the one matrix of `sums` sees, unweighted; some of them go to `held` instead."""
        values = row_extremes(x)
        x, values, good = self._finite(x, values, what, None)
        bad = 0.0 if good is None else (~good).sum()
        if held is not None:
            keep = torch.ones(len(x), dtype=torch.bool, device=x.device)
            keep[held.take([0, len(x)], None, x=x)] = False
            x = x * keep.unsqueeze(1)
            good = keep if good is None else good & keep
        rows = float(x.shape[0]) if good is None else good.sum()
        sums.count += rows
        sums.weight += rows
        sums.nonfinite += bad
        squares = column_squares(x)
        sums.plain += squares
        sums.diagonal += squares
        sums.extremes((values[0].amax(0, True), values[1].amax(0, True), values[2].amax(0, True)))
        if sums.second is not None:
            add_gram(sums.second[0], x)

    def _finite(
        self,
        x: Tensor,
        values: tuple[Tensor, Tensor, Tensor],
        what: str,
        token: Tensor | None,
        expert: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """x and its row extremes with bad rows zeroed, and the mask of good rows (None when all are good).

        Raises ValueError at the first bad row unless the run goes on without them.
        """
        good = torch.isfinite(values[0])
        if bool(good.all()):
            return x, values, None
        if not self.collect.skip_nonfinite:
            row = int(torch.nonzero(~good)[0])
            index = row if token is None else int(token[row])
            place = f"layer {self.layer}" + ("" if expert is None else f", expert {int(expert[row])}")
            raise InputError(
                f"{place}, token {index % self.length} of window {self.window + index // self.length}: the {what} "
                f"holds NaN or infinity, in {int((~good).sum())} of {len(good)} rows; expected finite activations "
                "(--skip-nonfinite leaves such rows out)"
            )
        x = torch.where(good[:, None], x, torch.zeros_like(x))
        return x, tuple(torch.where(good, v, torch.zeros_like(v)) for v in values), good  # type: ignore[return-value]

    # experts

    def moe_input(self, x: Tensor, routing: Routing) -> None:
        """Count the router's choices and keep them for `experts`."""
        values = row_extremes(x)
        x, values, good = self._finite(x, values, "input of the experts", None)
        if good is not None:
            # The router's weights of a token that is not finite are not finite either.
            routing = replace(routing, weights=torch.where(good[:, None], routing.weights, 0.0))
        self.routing, self.good = routing, good
        self.row_weight = routing.weights if self.collect.weighting == "router" else torch.ones_like(routing.weights)
        if self.shared:
            self._all_experts(x, values, good)
        if self.first:
            self.router.add(routing, self.token_domain, good)
            torch.maximum(self.hidden_amax, abs_max(x, 0), out=self.hidden_amax)
            if not self.shared:
                self._token_level(x, values, good)

    def _token_level(self, x: Tensor, values: tuple[Tensor, Tensor, Tensor], good: Tensor | None) -> None:
        """Everything about the experts' input but second moments, from tokens and the routing matrix."""
        chosen, experts = self.routing.chosen, self.geometry.experts
        row_weight = self.row_weight if good is None else self.row_weight * good[:, None]
        ones = torch.ones_like(row_weight) if good is None else good[:, None].expand(row_weight.shape)
        took, weight = spread(ones, chosen, experts), spread(row_weight.square(), chosen, experts)
        sums = self.expert_in
        sums.count += took.sum(0)
        sums.weight += weight.sum(0)
        self.weight4 += weight.square().sum(0)
        if good is not None:
            sums.nonfinite += spread((~good[:, None]).expand(row_weight.shape), chosen, experts).sum(0)
        squares = x.float().square()
        sums.plain += took.T @ squares
        if sums.second is None:
            sums.diagonal += weight.T @ squares
        first, second, third = (spread(v[:, None], chosen, experts).amax(0) for v in values)
        sums.extremes((first, second, third))

    def experts(self, x: Tensor, h: Tensor, y: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
        """Sum what the experts see, and their outputs' norms."""
        with stage("moments"):
            self._routed(x, h, y, (token, slot, offsets))

    def _routed(self, x: Tensor, h: Tensor, y: Tensor, place: tuple[Tensor, Tensor, list[int]]) -> None:
        token, slot, offsets = place
        owner = owners(offsets, token)
        row_weight = self._hold(x, h, self.row_weight[token, slot], offsets)
        if self.held and self.first:  # _token_level counted all rows
            lost = self.row_weight[token, slot].square() - row_weight.square()
            self.expert_in.weight -= self._by_expert(lost, token, owner).sum(0)
            self.weight4 -= self._by_expert(lost.square(), token, owner).sum(0)
        self._experts(x, h, y, (token, slot, offsets), row_weight)

    def _experts(
        self, x: Tensor, h: Tensor, y: Tensor, place: tuple[Tensor, Tensor, list[int]], row_weight: Tensor
    ) -> None:
        """Sums over routed rows; place: token, slot and offsets of `experts`, row_weight [R]: what a row counts."""
        token, slot, offsets = place
        owner = owners(offsets, token)
        if self.first:
            norm = torch.linalg.vector_norm(y, dim=1, dtype=torch.float32).nan_to_num(0.0, 0.0)
            self.saliency += self._by_expert(norm * self.routing.weights[token, slot], token, owner).sum(0)
        if self.shared:
            return
        values = row_extremes(h)
        h, values, good = self._finite(h, values, "input of down", token, owner)
        live = torch.ones_like(row_weight) if good is None else good.float()
        if self.good is not None:
            # A bad x makes a bad h, which the mask has left out already; only x itself is still to be cleared.
            x = torch.where(self.good[token][:, None], x, torch.zeros_like(x))
        if self.first:
            self._mid_extremes(values, live, row_weight, token, owner)
        self._row_sums(x, h, row_weight * live, offsets)

    def _hold(self, x: Tensor, h: Tensor, row_weight: Tensor, offsets: list[int]) -> Tensor:
        """The rows' weights, zero for those that are held out."""
        if not self.held:
            return row_weight
        row_weight = row_weight.clone()
        row_weight[self.held["experts"].take(offsets, row_weight, x=x, h=h)] = 0.0
        return row_weight

    def _by_expert(self, values: Tensor, token: Tensor, owner: Tensor) -> Tensor:
        """Values [R] of routed rows of consecutive tokens as [tokens, E], zero elsewhere."""
        tokens = len(token) // self.routing.chosen.shape[1]
        out = torch.zeros(tokens, self.geometry.experts, device=values.device)
        out[token - token.amin(), owner] = values.float()
        return out

    def _mid_extremes(
        self, values: tuple[Tensor, Tensor, Tensor], live: Tensor, row_weight: Tensor, token: Tensor, owner: Tensor
    ) -> None:
        sums = self.expert_mid
        sums.count += self._by_expert(live, token, owner).sum(0)
        sums.nonfinite += self._by_expert(1.0 - live, token, owner).sum(0)
        sums.weight += self._by_expert((row_weight * live).square(), token, owner).sum(0)
        first, second, third = (self._by_expert(v, token, owner).amax(0) for v in values)
        sums.extremes((first, second, third))

    def _row_sums(self, x: Tensor, h: Tensor, row_weight: Tensor, offsets: list[int]) -> None:
        """Second moments (or weighted diagonals) and per-channel extremes, expert by expert."""
        second_in, second_mid = self.expert_in.second, self.expert_mid.second
        scaled = scaled_rows(h, row_weight)
        weighted = scaled_rows(x, row_weight) if second_in is not None else x
        for expert, (start, stop) in enumerate(pairwise(offsets)):
            if start == stop:
                continue
            if self.first:
                rows = h[start:stop]
                self.expert_mid.plain[expert] += column_squares(rows)
                torch.maximum(self.mid_amax[expert], abs_max(rows, 0), out=self.mid_amax[expert])
                if second_mid is None:
                    self.expert_mid.diagonal[expert] += column_squares(scaled[start:stop])
            if expert in self.kept and second_in is not None and second_mid is not None:
                add_gram(second_in[expert - self.kept.start], weighted[start:stop])
                add_gram(second_mid[expert - self.kept.start], scaled[start:stop])

    def _all_experts(self, x: Tensor, values: tuple[Tensor, Tensor, Tensor], good: Tensor | None) -> None:
        """Every expert sees every token, unweighted."""
        if self.first:
            self._single(self.expert_in, x, "input of the experts")
        for expert in self.kept if not self.first else range(self.geometry.experts):
            h = F.silu(x @ self.weights.gate[expert].T) * (x @ self.weights.up[expert].T)
            extremes = row_extremes(h)
            owner = torch.full((x.shape[0],), expert, device=x.device)
            h, extremes, fine = self._finite(h, extremes, "input of down", torch.arange(x.shape[0]), owner)
            if expert in self.kept and self.expert_mid.second is not None:
                add_gram(self.expert_mid.second[expert - self.kept.start], h)
            if self.first:
                rows = float(x.shape[0]) if fine is None else fine.sum()
                sums, squares = self.expert_mid, column_squares(h)
                sums.count[expert] += rows
                sums.weight[expert] += rows
                sums.nonfinite[expert] += x.shape[0] - rows
                sums.plain[expert] += squares
                sums.diagonal[expert] += squares
                for have, new in zip((sums.amax, sums.sum32, sums.sum16), extremes, strict=True):
                    have[expert] = torch.maximum(have[expert], new.amax())
                self.mid_amax[expert] = torch.maximum(self.mid_amax[expert], h.abs().amax(0).float())

    def statistics(self) -> LayerStatistics:
        """The layer's statistics as they stand."""
        experts, expert_in = self.geometry.experts, self.expert_in.moments()
        weight4 = self.weight4
        if self.shared:
            expert_in = expanded(expert_in, experts)
            weight4 = expert_in.weight.clone()
        held = self.held["experts"] if self.held else None
        single = {name: self.held[name].of("x") if self.held else None for name in ("attention_in", "attention_out")}
        if held is not None:
            expert_in = replace(expert_in, held=held.of("x"))
        router = self.router
        routing = RoutingStatistics(router.load, router.coactivation, router.margins, self.saliency, weight4)
        return LayerStatistics(
            layer=self.layer,
            attention_in=self.attention_in.moments(single["attention_in"]),
            attention_out=self.attention_out.moments(single["attention_out"]),
            expert_in=expert_in,
            expert_mid=self.expert_mid.moments(None if held is None else held.of("h")),
            routing=routing,
            hidden_amax=self.hidden_amax,
            mid_amax=self.mid_amax,
            kv_amax=self.kv_amax,
        )
