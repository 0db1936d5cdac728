"""Convert between statistics and llama.cpp's importance matrix: unweighted sums of x^2 per expert."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ...convert.gguf.imatrix import Imatrix, Importance, layer_weights
from ...quantize.moments import Moments
from .layer import LayerStatistics
from .store import StoredStatistics


def importance(moments: Moments) -> Importance:
    """Sums of x^2 and rows, unweighted as llama-imatrix has them."""
    return Importance(_array(moments.plain_diagonal), _array(moments.count))


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().float().numpy().copy()


def add_layer(weights: dict[str, Importance], found: LayerStatistics) -> None:
    """Add one layer's eight weights."""
    # Every token goes through the router; its sums are the experts' by token instead of by row.
    rows = float(found.attention_in.count.sum())
    chosen = float(found.expert_in.count.sum()) / max(rows, 1.0)
    router = Importance(
        _array(found.expert_in.plain_diagonal.sum(0, keepdim=True) / chosen), np.array([rows], np.float32)
    )
    experts = importance(found.expert_in), importance(found.expert_mid)
    layers = layer_weights(
        found.layer, importance(found.attention_in), importance(found.attention_out), router, experts
    )
    weights.update(layers)


def imatrix_of(stored: StoredStatistics) -> Imatrix:
    """The importance matrix of stored statistics."""
    corpus = stored.identity["corpus"]
    layers = (stored.layer(n, second=False) for n in range(stored.layers))
    return imatrix_of_layers(layers, [s["name"] for s in corpus["sets"]], corpus["windows"], corpus["context"])


def imatrix_of_layers(
    layers: Iterable[LayerStatistics], datasets: Iterable[str], windows: int, context: int
) -> Imatrix:
    """The importance matrix of layers as they come."""
    weights: dict[str, Importance] = {}
    for found in layers:
        add_layer(weights, found)
    return Imatrix(weights, tuple(datasets), windows, context)


def moments_of(value: Importance) -> Moments:
    """Moments that know only an imatrix's diagonals; extremes are unknown and zero."""
    sums, counts = torch.from_numpy(value.sums.copy()), torch.from_numpy(value.counts.copy())
    none = torch.zeros_like(counts)
    return Moments(counts, counts.clone(), None, sums, sums.clone(), none, none.clone(), none.clone(), none.clone())
