"""The MiniMax-M2 architecture for training: dense attention, sigmoid router, experts in fixed-capacity buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the demo model; the names are those of config.json, shortened."""

    hidden: int = 256
    width: int = 256  # of an expert
    layers: int = 4
    experts: int = 16
    chosen: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary: int = 32
    vocab: int = 2048
    context: int = 512
    theta: float = 5e6
    epsilon: float = 1e-6


def matrix(*shape: int, std: float = 0.02) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)


class Layer(nn.Module):
    """One decoder layer. Matrices are [out, in], experts stacked in front; computed in the dtype of the input."""

    bias: Tensor
    load: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        s = self.shape = shape
        deep = 0.02 / math.sqrt(2 * s.layers)  # what is added to the residual stream starts smaller
        self.input_norm, self.post_norm = nn.Parameter(torch.ones(s.hidden)), nn.Parameter(torch.ones(s.hidden))
        self.q_norm = nn.Parameter(torch.ones(s.heads * s.head_dim))
        self.k_norm = nn.Parameter(torch.ones(s.kv_heads * s.head_dim))
        self.q = matrix(s.heads * s.head_dim, s.hidden)
        self.k = matrix(s.kv_heads * s.head_dim, s.hidden)
        self.v = matrix(s.kv_heads * s.head_dim, s.hidden)
        self.o = matrix(s.hidden, s.heads * s.head_dim, std=deep)
        self.gate = matrix(s.experts, s.hidden)
        self.w1 = matrix(s.experts, s.width, s.hidden)
        self.w3 = matrix(s.experts, s.width, s.hidden)
        self.w2 = matrix(s.experts, s.hidden, s.width, std=deep)
        self.register_buffer("bias", torch.zeros(s.experts))  # selection only, moved by the load, not by gradients
        self.register_buffer("load", torch.zeros(s.experts))  # assignments since the last step

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.shape.epsilon)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, hidden]; cos, sin [T, rotary]."""
        x = x + self.attention(self.norm(x, self.input_norm), cos, sin)
        return x + self.experts(self.norm(x, self.post_norm).reshape(-1, x.shape[-1])).view_as(x)

    def attention(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (batch, time, _) = self.shape, h.shape

        def heads(z: Tensor, count: int) -> Tensor:
            return z.view(batch, time, count, s.head_dim).transpose(1, 2)

        q = heads(self.norm(h @ self.q.to(h.dtype).T, self.q_norm), s.heads)
        k = heads(self.norm(h @ self.k.to(h.dtype).T, self.k_norm), s.kv_heads)
        v = heads(h @ self.v.to(h.dtype).T, s.kv_heads)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(batch, time, -1) @ self.o.to(h.dtype).T

    def rotate(self, z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE on the first `rotary` dimensions of each head, halves paired (NeoX order)."""
        turned, kept = z[..., : self.shape.rotary], z[..., self.shape.rotary :]
        half = self.shape.rotary // 2
        crossed = torch.cat([-turned[..., half:], turned[..., :half]], -1)
        return torch.cat([turned * cos + crossed * sin, kept], -1)

    def experts(self, h: Tensor) -> Tensor:
        """h [N, hidden]. Each expert takes at most `capacity` tokens; what does not fit is dropped (rare)."""
        s, tokens = self.shape, h.shape[0]
        scores = torch.sigmoid(h.float() @ self.gate.T)
        chosen = torch.topk(scores.detach() + self.bias, s.chosen, -1).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        expert = chosen.reshape(-1)
        order = torch.argsort(expert, stable=True)
        expert = expert[order]
        count = F.one_hot(expert, s.experts).sum(0)
        if self.training:
            self.load.add_(count.float())
        capacity = int(tokens * s.chosen / s.experts * (1.5 if self.training else 4.0))
        place = torch.arange(tokens * s.chosen, device=h.device) - (count.cumsum(0) - count)[expert]
        slot = torch.where(place < capacity, expert * capacity + place, s.experts * capacity)  # the last: dropped
        source = order // s.chosen
        rows = torch.zeros(s.experts * capacity + 1, s.hidden, dtype=h.dtype, device=h.device)
        rows = rows.index_copy(0, slot, h[source])[:-1].view(s.experts, capacity, s.hidden)
        out = self.feed_forward(rows).view(s.experts * capacity, s.hidden)
        out = torch.cat([out, out.new_zeros(1, s.hidden)])[slot]
        out = out * weights.reshape(-1)[order].to(h.dtype)[:, None]
        return torch.zeros_like(h).index_add(0, source, out)

    def feed_forward(self, rows: Tensor) -> Tensor:
        """rows [experts, capacity, hidden]; SwiGLU of each expert."""
        gate = F.silu(torch.bmm(rows, self.w1.to(rows.dtype).transpose(1, 2)))
        up = torch.bmm(rows, self.w3.to(rows.dtype).transpose(1, 2))
        return torch.bmm(gate * up, self.w2.to(rows.dtype).transpose(1, 2))

    @torch.no_grad()
    def balance(self, rate: float = 1e-3) -> None:
        """Move the selection bias towards equal load, as DeepSeek-V3 does without an auxiliary loss."""
        self.bias.add_(rate * torch.sign(self.load.mean() - self.load))
        self.load.zero_()


class Model(nn.Module):
    """Logits [B, T, vocab] of token ids [B, context]; bf16 compute, float32 parameters."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed, self.head = matrix(shape.vocab, shape.hidden), matrix(shape.vocab, shape.hidden)
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        frequency = 1 / shape.theta ** (torch.arange(0, shape.rotary, 2).float() / shape.rotary)
        angle = torch.outer(torch.arange(shape.context).float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed).to(torch.bfloat16)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.rms_norm(x, (x.shape[-1],), self.norm.to(x.dtype), self.shape.epsilon) @ self.head.to(x.dtype).T
