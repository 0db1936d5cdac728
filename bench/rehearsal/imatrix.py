"""An importance matrix of the model's shape: made up, for measuring what quantizing with one takes."""

from __future__ import annotations

import argparse

import numpy as np

from mmquant.convert.gguf.imatrix import Imatrix, Importance, layer_weights, write_imatrix

from .model import Model

ROWS = 1000.0  # that every matrix is said to have seen


def made_up(model: Model, seed: int) -> Imatrix:
    """Log-normal means of x^2 for every weight of every layer."""
    g, random = model.geometry, np.random.default_rng(seed)

    def draw(matrices: int, inputs: int) -> Importance:
        sums = (ROWS * random.lognormal(0.0, 1.0, (matrices, inputs))).astype(np.float32)
        return Importance(sums, np.full(matrices, ROWS, np.float32))

    weights: dict[str, Importance] = {}
    for layer in range(g.layers):
        attention = draw(1, g.hidden), draw(1, g.heads * g.head_dim), draw(1, g.hidden)
        weights |= layer_weights(layer, *attention, (draw(g.experts, g.hidden), draw(g.experts, g.expert_width)))
    return Imatrix(weights, ("made up",), 1, 512)


def write(options: argparse.Namespace) -> None:
    """Write it to options.file."""
    write_imatrix(options.file, made_up(Model(options.layers), options.seed))
