"""Memory of a streamed pass: what is held for how long, by shapes alone.

Hidden states of all models and the reference's chosen experts stay from layer to layer; beside them stand one layer's
weights and the activations of one batch, or, at the end, the logits of some rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...convert.models.geometry import Geometry
from ..model.attention import SCORE_BYTES, WHOLE_BYTES, block_of
from ..model.forward import rows_at_once
from ..statistics.layer_pass import layer_bytes

LOGITS, METRICS = 1 << 30, 5  # bytes of one model's logits at once (outcomes.LOGIT_BYTES); float64 arrays of a block
METRICS_BYTES = 256 << 20  # of one of them (metrics.BLOCK_BYTES)


@dataclass(frozen=True)
class Memory:
    """Bytes: `hidden` of all models' states, on the device, in memory or (beyond the limit) in files; the rest adds up.

    layer     the weights of a layer, and once more where a model multiplies them otherwise
    batch     activations of one batch at their most
    chosen    the reference's experts
    head      the head's weights and logits, at the end (then neither layer nor batch is there)
    """

    hidden: int
    layer: int
    batch: int
    chosen: int
    head: int

    @property
    def peak(self) -> int:
        """Without the hidden states."""
        return max(self.layer + self.batch + self.chosen, self.head)


def batch_bytes(g: Geometry, windows: int, context: int, dtype: torch.dtype, device: str, blocks: bool) -> int:
    """Activations of a batch of windows at their most: attention or experts, beside the residual stream.

    blocks: whether attention's scores are made in blocks (where an engine rounds them, and in float32 on CUDA)
    """
    tokens, size = windows * context, dtype.itemsize
    width, shared = g.heads * g.head_dim, g.kv_heads * g.head_dim
    stream = 3 * 4 * tokens * g.hidden  # before, after, and the normed input
    # q before and after it is turned, in float32, and as it is multiplied; the same of k; v; the output twice
    attention = tokens * (3 * 4 * width + 3 * 4 * shared + size * (3 * width + 2 * shared))
    if blocks:
        scores = 4 * windows * g.heads * context * block_of(windows, g.heads, context)
        attention += 3 * max(scores, min(SCORE_BYTES, scores)) + tokens * 4 * 2 * shared
    rows = min(tokens * g.experts_per_token, rows_at_once(torch.device(device)))
    experts = rows * size * (2 * g.hidden + 3 * g.expert_width) + 4 * tokens * (g.hidden + 3 * g.experts)
    experts += rows * 4 * g.hidden  # the rows that are added to their tokens
    return stream + max(attention, experts)


def memory_of(
    g: Geometry,
    windows: int,
    context: int,
    models: int,
    *,
    dtype: torch.dtype,
    device: str,
    tokens: int,
    changed: bool,
    ranks: int = 1,
    hidden_sizes: Sequence[int] = (),
) -> Memory:
    """Of one rank: `models` on their way through `windows` windows in all; tokens: of a batch.

    changed: whether some model multiplies other weights than it reads, or has its probabilities rounded
    """
    own = -(-windows // ranks)
    at_once = min(own, max(1, tokens // context))
    whole = 4 * at_once * g.heads * context * context > WHOLE_BYTES
    blocks = changed or (device.startswith("cuda") and dtype == torch.float32 and whole)
    sizes = list(hidden_sizes) or [g.hidden] * models
    rows = min(max(1, LOGITS // (4 * g.vocab)), context - 1)
    logits = models * rows * 4 * g.vocab + METRICS * min(METRICS_BYTES, 8 * rows * g.vocab)
    return Memory(
        hidden=4 * own * context * sum(sizes),
        layer=layer_bytes(g, dtype) * (2 if changed else 1),
        batch=batch_bytes(g, at_once, context, dtype, device, blocks),
        chosen=2 * own * context * g.experts_per_token,
        head=models * g.vocab * g.hidden * dtype.itemsize + logits,
    )
