"""The collector equals slow loops in float64 over tokens and experts, on awkward shapes."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from helpers.random_layer import DEAD, HIDDEN, SMALL, random_layer
from mmquant.calibration.model.forward import Observer, Routing, layer_forward
from mmquant.calibration.statistics.collect import Collect
from mmquant.calibration.statistics.collector import Collector
from mmquant.calibration.statistics.layer import (
    MARGIN_BINS,
    LayerStatistics,
    effective_rows,
    overflowing_experts,
    sampling_error,
)
from mmquant.convert.models.layer import LayerWeights
from mmquant.quantize.moments import Moments


class Inputs(Observer):
    """What enters attention's matrices and the experts, as it is."""

    def __init__(self) -> None:
        self.seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def attention_input(self, x: torch.Tensor) -> None:
        self.seen["in"].append(x.double())

    def attention_output(self, x: torch.Tensor) -> None:
        self.seen["out"].append(x.double())

    def moe_input(self, x: torch.Tensor, routing: Routing) -> None:
        self.seen["moe"].append(x.double())

    def all(self, name: str) -> torch.Tensor:
        return torch.cat(self.seen[name])


@dataclass
class Row:
    expert: int
    share: float
    x: torch.Tensor
    h: torch.Tensor
    y: torch.Tensor


def rows_by_definition(weights: LayerWeights, x: torch.Tensor, per_token: int) -> list[Row]:
    """Every (token, expert) pair of the router, one by one, in float64."""
    out, bias = [], weights.router_bias
    assert bias is not None
    for token in x:
        score = 1 / (1 + torch.exp(-(weights.router.double() @ token)))
        order = sorted(range(len(score)), key=lambda e: -float(score[e] + bias[e]))[:per_token]
        total = sum(float(score[e]) for e in order)
        for e in order:
            gate, up = weights.gate[e].double() @ token, weights.up[e].double() @ token
            h = gate / (1 + torch.exp(-gate)) * up
            out.append(Row(e, float(score[e]) / total, token, h, weights.down[e].double() @ h))
    return out


def block_sums(rows: list[torch.Tensor], size: int) -> float:
    largest = 0.0
    for row in rows:
        for start in range(0, len(row), size):
            largest = max(largest, abs(float(row[start : start + size].sum())))
    return largest


def collect(
    weights: LayerWeights, hidden: torch.Tensor, options: Collect, kept: range | None = None, batch: int = 2
) -> tuple[LayerStatistics, Inputs]:
    """Statistics over `hidden` [B, T, H] in batches, domain = number of the window modulo 2."""
    collector, inputs = Collector(7, weights, SMALL, options, 2, kept), Inputs()
    for start in range(0, len(hidden), batch):
        part = hidden[start : start + batch]
        collector.begin(start, hidden.shape[1], torch.arange(start, start + len(part)) % 2)
        layer_forward(weights, SMALL, part, collector)
        layer_forward(weights, SMALL, part, inputs)
    return collector.statistics(), inputs


def close(found: torch.Tensor | float, true: torch.Tensor | float, tolerance: float = 2e-5) -> None:
    found, true = torch.as_tensor(found).double(), torch.as_tensor(true).double()
    assert found.shape == true.shape
    assert float((found - true).abs().max()) <= tolerance * max(1.0, float(true.abs().max()))


def check_moments(moments: Moments, index: int, values: list[torch.Tensor], shares: list[float]) -> None:
    n = moments.inputs
    x = torch.stack(values) if values else torch.zeros(0, n, dtype=torch.float64)
    s2 = torch.tensor(shares, dtype=torch.float64).square()
    assert float(moments.count[index]) == len(values)
    close(moments.weight[index], s2.sum())
    close(moments.diagonal[index], (s2[:, None] * x * x).sum(0))
    close(moments.plain_diagonal[index], (x * x).sum(0))
    close(moments.amax[index], x.abs().max() if len(x) else 0.0)
    close(moments.sum32[index], block_sums(values, 32))
    close(moments.sum16[index], block_sums(values, 16))
    assert float(moments.nonfinite[index]) == 0
    if moments.second is not None:
        close(moments.second[index], torch.einsum("r,ri,rj->ij", s2, x, x))


@pytest.mark.parametrize("weighting", ["router", "uniform"])
@pytest.mark.parametrize("full", [True, False])
def test_moments_are_the_sums_of_the_definition(weighting: str, full: bool) -> None:
    weights = random_layer()
    found, inputs = collect(weights, HIDDEN, Collect(full, weighting))
    rows = rows_by_definition(weights, inputs.all("moe"), SMALL.experts_per_token)
    assert (found.expert_mid.second is not None) == full
    for e in range(SMALL.experts):
        mine = [row for row in rows if row.expert == e]
        shares = [row.share if weighting == "router" else 1.0 for row in mine]
        check_moments(found.expert_in, e, [row.x for row in mine], shares)
        check_moments(found.expert_mid, e, [row.h for row in mine], shares)
        close(found.routing.saliency[e], sum(row.share * float(row.y.norm()) for row in mine))
        close(found.routing.weight4[e], sum(share**4 for share in shares))
        if mine:
            close(found.mid_amax[e], torch.stack([row.h for row in mine]).abs().amax(0))
    for moments, name in ((found.attention_in, "in"), (found.attention_out, "out")):
        values = list(inputs.all(name))
        check_moments(moments, 0, values, [1.0] * len(values))
    close(found.hidden_amax, inputs.all("moe").abs().amax(0))
    assert found.expert_in.count[DEAD] == 0
    assert not found.expert_in.diagonal[DEAD].any()


def test_extremes_of_keys_and_values_are_those_of_what_a_cache_stores() -> None:
    weights = random_layer()
    assert weights.k_norm is not None
    found, inputs = collect(weights, HIDDEN, Collect())
    size, turned, largest = SMALL.head_dim, SMALL.rotary_dim // 2, torch.zeros(2, SMALL.head_dim).double()
    for row, x in enumerate(inputs.all("in")):
        k, v = weights.k.double() @ x, weights.v.double() @ x
        k = (k / (k.square().mean() + SMALL.norm_eps).sqrt() * weights.k_norm.double()).tolist()
        for i in range(turned):
            angle = (row % HIDDEN.shape[1]) * SMALL.rope_theta ** (-2 * i / SMALL.rotary_dim)
            value = complex(k[i], k[i + turned]) * complex(math.cos(angle), math.sin(angle))
            k[i], k[i + turned] = value.real, value.imag
        largest = torch.maximum(largest, torch.stack((torch.tensor(k, dtype=torch.float64), v)).abs())
    assert found.kv_amax.shape == (2, SMALL.kv_heads * size)
    close(found.kv_amax, largest)


def test_routing_counts_by_domain_pairs_and_margins() -> None:
    weights = random_layer()
    assert weights.router_bias is not None
    bias = weights.router_bias.double()
    found, inputs = collect(weights, HIDDEN, Collect())
    x = inputs.all("moe")
    rows = rows_by_definition(weights, x, 2)
    load, pairs = np.zeros((2, SMALL.experts)), np.zeros((SMALL.experts, SMALL.experts))
    bins = np.zeros(MARGIN_BINS)
    for token in range(len(x)):
        window = token // HIDDEN.shape[1]
        a, b = rows[2 * token].expert, rows[2 * token + 1].expert
        for e in (a, b):
            load[window % 2, e] += 1
        for pair in ((a, a), (b, b), (a, b), (b, a)):
            pairs[pair] += 1
        score = 1 / (1 + torch.exp(-(weights.router.double() @ x[token]))) + bias
        second, third = sorted(score.tolist(), reverse=True)[1:3]
        bins[max(0, min(MARGIN_BINS - 1, math.floor(math.log2(second - third)) + MARGIN_BINS))] += 1
    assert np.array_equal(found.routing.load.numpy(), load)
    assert np.array_equal(found.routing.coactivation.numpy(), pairs)
    assert np.abs(found.routing.margins.numpy() - bins).sum() <= 2  # a float32 gap may fall over a bin's edge
    assert found.routing.tokens_per_expert.sum() == 2 * len(x)


def test_every_token_through_every_expert() -> None:
    weights = random_layer()
    found, inputs = collect(weights, HIDDEN, Collect(experts="all"))
    x = inputs.all("moe")
    natural = collect(weights, HIDDEN, Collect())[0]
    for e in range(SMALL.experts):
        gate, up = x @ weights.gate[e].double().T, x @ weights.up[e].double().T
        h = gate * torch.sigmoid(gate) * up
        check_moments(found.expert_in, e, list(x), [1.0] * len(x))
        check_moments(found.expert_mid, e, list(h), [1.0] * len(x))
        close(found.mid_amax[e], h.abs().amax(0))
    assert torch.equal(found.routing.load, natural.routing.load)
    close(found.routing.saliency, natural.routing.saliency)


def test_equal_runs_give_equal_bits_and_chunks_give_the_same_sums() -> None:
    weights = random_layer()
    whole, again = collect(weights, HIDDEN, Collect())[0], collect(weights, HIDDEN, Collect())[0]
    part = collect(weights, HIDDEN, Collect(), kept=range(1, 3))[0]
    for a, b in ((whole.expert_in, again.expert_in), (whole.expert_mid, again.expert_mid)):
        assert a.second is not None
        assert b.second is not None
        assert torch.equal(a.second, b.second)
        assert torch.equal(a.plain_diagonal, b.plain_diagonal)
    assert whole.expert_in.second is not None
    assert part.expert_in.second is not None
    assert torch.equal(whole.expert_in.second[1:3], part.expert_in.second)


def test_bfloat16_rows_are_summed_in_float32() -> None:
    """Many equal rows: a bfloat16 accumulator would stop growing at 256 of them."""
    weights = random_layer()
    half = LayerWeights(**{k: v.bfloat16() if v.dim() > 1 and k != "router" else v for k, v in vars(weights).items()})
    hidden = HIDDEN[:1, :1].expand(40, 100, -1).contiguous()
    collector = Collector(0, half, SMALL, Collect(weighting="uniform"), 1)
    collector.begin(0, 100, torch.zeros(40, dtype=torch.long))
    layer_forward(half, SMALL, hidden, collector)
    found = collector.statistics()
    rows = found.expert_in.count.max()
    assert rows == 4000
    expert = int(found.expert_in.count.argmax())
    assert found.expert_in.second is not None
    x2 = found.expert_in.amax[expert].square()
    close(found.expert_in.second[expert].max(), rows * x2, 1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_named_or_left_out(value: float) -> None:
    weights = random_layer()
    bad = replace(weights, gate=weights.gate.clone())
    _, inputs = collect(weights, HIDDEN, Collect())
    rows = rows_by_definition(weights, inputs.all("moe"), 2)
    expert = rows[0].expert
    bad.gate[expert, 5] = value
    seen = [i // 2 for i, row in enumerate(rows) if row.expert == expert]
    with pytest.raises(
        ValueError, match=rf"layer 7, expert {expert}, token \d+ of window \d+: the input of down"
    ) as caught:
        collect(bad, HIDDEN, Collect())
    window, token = seen[0] // HIDDEN.shape[1], seen[0] % HIDDEN.shape[1]
    assert f"token {token} of window {window}" in str(caught.value)
    found, _ = collect(bad, HIDDEN, Collect(skip_nonfinite=True))
    assert found.expert_mid.nonfinite[expert] == len(seen)
    assert found.expert_mid.count[expert] == 0
    assert torch.isfinite(found.expert_mid.diagonal).all()
    assert torch.isfinite(found.routing.saliency).all()
    others = [e for e in range(SMALL.experts) if e != expert]
    whole, _ = collect(weights, HIDDEN, Collect())
    assert torch.equal(found.expert_mid.plain_diagonal[others], whole.expert_mid.plain_diagonal[others])


def test_a_window_that_enters_with_nan_is_left_out_of_every_sum() -> None:
    weights, hidden = random_layer(), HIDDEN.clone()
    hidden[3, -1, 0] = math.nan  # 0 * NaN of masked positions spreads it over the window inside attention
    with pytest.raises(ValueError, match="layer 7, token 6 of window 3: the input of q, k, v"):
        collect(weights, hidden, Collect())
    found, _ = collect(weights, hidden, Collect(skip_nonfinite=True), batch=1)
    rest, _ = collect(weights, torch.cat((HIDDEN[:3], HIDDEN[4:])), Collect(), batch=1)
    assert found.attention_in.nonfinite.sum() == 1
    assert found.expert_in.nonfinite.sum() >= 2
    assert float(found.expert_in.count.sum() + found.expert_in.nonfinite.sum()) == 2 * HIDDEN[..., 0].numel()
    bad = int(found.expert_in.nonfinite.sum()) // 2
    if bad == HIDDEN.shape[1]:
        for a, b in ((found.expert_in, rest.expert_in), (found.expert_mid, rest.expert_mid)):
            assert torch.equal(a.count, b.count)
            close(a.weight, b.weight)
            assert a.second is not None
            assert b.second is not None
            close(a.second, b.second)
            close(a.amax, b.amax)
        close(found.routing.saliency, rest.routing.saliency)


def test_overflow_is_named_by_block_sums_even_when_no_value_overflows() -> None:
    found, _ = collect(random_layer(), HIDDEN, Collect(full=False))
    assert overflowing_experts(found) == []
    mid = replace(found.expert_mid, sum32=found.expert_mid.sum32.clone())
    mid.sum32[2] = 70000.0
    assert overflowing_experts(replace(found, expert_mid=mid)) == [2]


def test_sampling_error_predicts_the_spread_of_gaussian_estimates() -> None:
    generator = torch.Generator().manual_seed(3)
    scale = torch.linspace(0.1, 2.0, 24)
    true, rows = torch.diag(scale.square()), 400
    errors = []
    for _ in range(60):
        x = torch.randn(rows, 24, generator=generator) * scale
        errors.append(float((x.T @ x / rows - true).norm() / true.norm()))
    zero = torch.zeros(1)
    second = (true * rows)[None]
    moments = Moments(zero + rows, zero + rows, second, second.diagonal(dim1=1, dim2=2), zero, zero, zero, zero, zero)
    predicted = float(sampling_error(moments, torch.tensor([float(rows)]))[0])
    assert abs(predicted / (sum(e * e for e in errors) / len(errors)) ** 0.5 - 1) < 0.1
    assert sampling_error(moments, torch.zeros(1)).item() == math.inf


def test_effective_rows_of_equal_weights_are_the_rows() -> None:
    found, _ = collect(random_layer(), HIDDEN, Collect(weighting="uniform"))
    close(effective_rows(found), found.expert_in.count)
