"""The reference forward, one layer at a time, with observers of every matrix's input.

Matrices run in the weights' dtype (float32 or bfloat16); router, softmax, norms and the residual stream in float32.
Never float16: the last layer of M2.7 overflows it. What differs between architectures is in `Geometry.rules`; of
MiniMax-M2 it follows transformers 5.23 `MiniMaxM2DecoderLayer` (RoPE on the first `rotary_dim` dimensions, norm over
all heads at once, selection by score + bias, weights = scores renormalised).
Shapes: B windows, T positions, N = B*T tokens, H hidden, E experts, K experts per token, I expert width, R = N*K rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...convert.models.geometry import Geometry
from ...convert.models.layer import Globals, LayerWeights
from ...convert.models.rope import frequencies
from .attention import attend
from .combine import combine

# Routed rows that an expert batch may hold at once; bounds the activations, not the result.
ROWS = 1 << 17

# What an engine does to a matrix's inputs before it multiplies, by the matrix (q k v o gate up down); QUERY, KEY, VALUE
# and MASS: to what attention multiplies; HEAD_INPUT: to the head's input; STEP: to every result on the way, also to the
# residual stream (engine_like.py). By default nothing.
Change = Callable[[Tensor], Tensor]
Rounding = Mapping[str, Change]
EXACT: Rounding = {}
QUERY, KEY, VALUE, MASS, HEAD_INPUT, STEP = "query", "key", "value", "mass", "head", "step"


def rounded(rounding: Rounding, name: str, x: Tensor) -> Tensor:
    """x as the matrix `name` sees it."""
    change = rounding.get(name)
    return x if change is None else change(x)


@dataclass(frozen=True)
class Routing:
    """The router's choice for N tokens: scores [N, E], chosen experts [N, K] int64, their weights [N, K]."""

    scores: Tensor
    chosen: Tensor
    weights: Tensor


class Observer:
    """What a pass may watch; every method does nothing here. Rows are tokens, in the order of the batch."""

    def attention_input(self, x: Tensor) -> None:
        """x [N, H]: what q, k, v see."""

    def keys_values(self, k: Tensor, v: Tensor) -> None:
        """k, v [B, kv_heads, T, head_dim]: what a KV cache stores (keys normed and rotated)."""

    def attention_output(self, x: Tensor) -> None:
        """x [N, heads * head_dim]: what o_proj sees."""

    def moe_input(self, x: Tensor, routing: Routing) -> None:
        """x [N, H]: what the router and the experts see."""

    def experts(self, x: Tensor, h: Tensor, y: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
        """Routed rows sorted by expert: x [R, H], h [R, I] (down's input), y [R, H] before weighting; token, slot [R].

        Expert e owns rows offsets[e]:offsets[e+1]. May be called several times a batch, for ranges of tokens.
        """


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis in float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


def rotary_tables(geometry: Geometry, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [T, rotary_dim] float32 of positions 0..T-1 (halves repeated, NeoX pairing), scaled as asked."""
    scaling = geometry.rope_scaling
    if scaling is None:
        exponent = torch.arange(0, geometry.rotary_dim, 2, dtype=torch.float32, device=device) / geometry.rotary_dim
        turns = geometry.rope_theta**-exponent
    else:
        turns = torch.tensor(frequencies(geometry.rope_theta, geometry.rotary_dim, scaling), device=device)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), turns)
    angles = torch.cat((angles, angles), dim=-1)
    size = 1.0 if scaling is None else scaling.attention_factor
    return angles.cos() * size, angles.sin() * size


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first cos.shape[-1] dimensions of each head; x [B, heads, T, head_dim]."""
    size = cos.shape[-1]
    turn, rest = x[..., :size], x[..., size:]
    half = torch.cat((-turn[..., size // 2 :], turn[..., : size // 2]), dim=-1)
    return torch.cat((turn * cos + half * sin, rest), dim=-1)


def normed_heads(x: Tensor, weight: Tensor | None, g: Geometry) -> Tensor:
    """q or k [B, T, heads * head_dim] -> [B, T, heads, head_dim], normed as `g.rules` says."""
    apart = (*x.shape[:2], -1, g.head_dim)
    if weight is None:
        return x.float().view(apart)
    return rms_norm(x.view(apart) if g.rules.qk_norm == "head" else x, weight, g.norm_eps).view(apart)


def attention(
    weights: LayerWeights, g: Geometry, hidden: Tensor, observer: Observer, rounding: Rounding = EXACT
) -> Tensor:
    """Causal attention's contribution to the residual: hidden [B, T, H] float32 -> [B, T, H] float32."""
    batch, length, _ = hidden.shape
    dtype = weights.q.dtype

    def step(value: Tensor) -> Tensor:
        return rounded(rounding, STEP, value)

    x = step(rms_norm(hidden, weights.input_norm, g.norm_eps)).to(dtype)
    observer.attention_input(x.flatten(0, 1))
    q, k, v = (step(rounded(rounding, name, x) @ getattr(weights, name).T) for name in ("q", "k", "v"))
    q, k = normed_heads(q, weights.q_norm, g).transpose(1, 2), normed_heads(k, weights.k_norm, g)
    v = v.view(batch, length, g.kv_heads, g.head_dim).transpose(1, 2)
    cos, sin = rotary_tables(g, length, hidden.device)
    q, k = (step(rotate(step(part), cos, sin)).to(dtype) for part in (q, k.transpose(1, 2)))
    observer.keys_values(k, v)
    q, k, v = (rounded(rounding, name, part) for name, part in ((QUERY, q), (KEY, k), (VALUE, v)))
    out = step(attend(q, k, v, rounding.get(MASS))).transpose(1, 2).reshape(batch, length, -1)
    observer.attention_output(out.flatten(0, 1))
    return step(rounded(rounding, "o", out) @ weights.o.T).float()


def route(x: Tensor, router: Tensor, bias: Tensor | None, g: Geometry) -> Routing:
    """Routing in float32 by `g.rules`: x [N, H] -> the experts with the largest score (+ bias) of each token."""
    logits = x.float() @ router.float().T
    scores = torch.sigmoid(logits) if g.rules.scoring == "sigmoid" else torch.softmax(logits, -1)
    chosen = torch.topk(biased(scores, bias), g.experts_per_token, dim=-1).indices
    weights = scores.gather(1, chosen)
    return Routing(scores, chosen, weights / weights.sum(-1, keepdim=True) if g.rules.renormalize else weights)


def biased(scores: Tensor, bias: Tensor | None) -> Tensor:
    """What experts are chosen by: scores [N, E], plus the router's bias [E] where it has one."""
    return scores if bias is None else scores + bias.float()


def grouped_matmul(x: Tensor, weight: Tensor, offsets: list[int]) -> Tensor:
    """Rows offsets[e]:offsets[e+1] of x [R, n] times weight[e].T; weight [E, m, n] -> [R, m]."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        ends = torch.tensor(offsets[1:], dtype=torch.int32, device=x.device)
        return torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends)  # pyright: ignore[reportPrivateImportUsage]
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, (start, stop) in enumerate(pairwise(offsets)):
        if stop > start:
            torch.mm(x[start:stop], weight[expert].T, out=out[start:stop])
    return out


def rows_at_once(device: torch.device) -> int:
    """Routed rows of one expert batch, by the device's total memory: at M2.7's width 1 << 20 rows take 46 GB."""
    if device.type != "cuda":
        return ROWS
    total = torch.cuda.get_device_properties(device).total_memory
    return ROWS << (3 if total > 100e9 else 1 if total > 60e9 else 0)


def run_experts(
    weights: LayerWeights, x: Tensor, routing: Routing, observer: Observer, rounding: Rounding = EXACT
) -> Tensor:
    """Weighted sum of the chosen experts' outputs: x [N, H] -> [N, H] float32. Deterministic: no atomics."""
    tokens, per_token = routing.chosen.shape
    out = torch.empty(tokens, x.shape[1], dtype=torch.float32, device=x.device)
    step = max(1, rows_at_once(x.device) // per_token)
    for start in range(0, tokens, step):
        chosen = routing.chosen[start : start + step]
        order = torch.argsort(chosen.flatten(), stable=True)
        token, slot = order // per_token, order % per_token
        counts = torch.bincount(chosen.flatten(), minlength=weights.gate.shape[0])
        offsets = [0, *torch.cumsum(counts, 0).tolist()]
        rows = x[start : start + step][token]
        gate, up = (
            rounded(rounding, STEP, grouped_matmul(rounded(rounding, name, rows), matrix, offsets))
            for name, matrix in (("gate", weights.gate), ("up", weights.up))
        )
        h = rounded(rounding, STEP, F.silu(gate) * up)
        y = rounded(rounding, STEP, grouped_matmul(rounded(rounding, "down", h), weights.down, offsets))
        observer.experts(rows, h, y, token + start, slot, offsets)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        router_weight = routing.weights[start : start + step]
        out[start : start + step] = combine(y, place.view(-1, per_token), router_weight)
    return out


def moe(weights: LayerWeights, g: Geometry, hidden: Tensor, observer: Observer, rounding: Rounding = EXACT) -> Tensor:
    """The experts' contribution to the residual: hidden [B, T, H] float32 -> [B, T, H] float32."""
    normed = rms_norm(hidden, weights.post_norm, g.norm_eps).flatten(0, 1)
    x = rounded(rounding, STEP, normed).to(weights.gate.dtype)
    routing = route(x, weights.router, weights.router_bias, g)
    observer.moe_input(x, routing)
    return run_experts(weights, x, routing, observer, rounding).view(hidden.shape)


def layer_forward(
    weights: LayerWeights,
    geometry: Geometry,
    hidden: Tensor,
    observer: Observer | None = None,
    rounding: Rounding = EXACT,
) -> Tensor:
    """One decoder layer: residual stream [B, T, H] float32 in, [B, T, H] float32 out."""
    watch = observer if observer is not None else Observer()
    hidden = rounded(rounding, STEP, hidden + attention(weights, geometry, hidden, watch, rounding))
    return rounded(rounding, STEP, hidden + moe(weights, geometry, hidden, watch, rounding))


def embed(model: Globals, tokens: Tensor) -> Tensor:
    """tokens [B, T] int64 -> residual stream [B, T, H] float32."""
    return F.embedding(tokens.to(model.embed.device), model.embed).float()


def final_logits(model: Globals, geometry: Geometry, hidden: Tensor, rounding: Rounding = EXACT) -> Tensor:
    """Residual stream [..., H] -> logits [..., V] float32."""
    x = rounded(rounding, STEP, rms_norm(hidden, model.norm, geometry.norm_eps)).to(model.head.dtype)
    return rounded(rounding, STEP, (rounded(rounding, HEAD_INPUT, x) @ model.head.T).float())
