"""Ablation: KLD of GGUF types on the demo model with parts of the method left out, without llama.cpp.

python bench/gguf_quality.py [--calibration TOKENS.npy] [--evaluation TOKENS.npy] [--mix Q2_K ...] [--method NAME ...]

Values are decoded and scored by the reference forward in float32 (activations unquantized), second half of each window.
Tokens: uint16 [W, T]; without files the bundled texts are used. "search" weighs by importance in the
quantized model (--effort fast does so in the reference: no worse); "feedback" adds error feedback, "descent" two rounds
of coordinate descent, "correction" the two streams, "default" the repair of router and head.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import _path  # noqa: F401  # pyright: ignore[reportUnusedImport]
import numpy as np
import torch
from torch import Tensor

from mmquant.calibration.gguf.layer import head_pair, quantize_head, quantize_layer
from mmquant.calibration.gguf.solve import METHODS, Method, Report
from mmquant.calibration.gguf.streams import Streams
from mmquant.calibration.model.forward import embed, final_logits, layer_forward
from mmquant.calibration.model.hidden import HiddenStates
from mmquant.calibration.text.chat import load_template
from mmquant.calibration.text.corpus import bundled, pack_windows, read_sets
from mmquant.calibration.text.tokenizer import load_tokenizer
from mmquant.convert.gguf.mixes import find_mix, tensor_types
from mmquant.convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS
from mmquant.convert.models.layer import Globals, LayerWeights
from mmquant.convert.open import open_source
from mmquant.convert.source import read_globals, read_layer
from mmquant.quantize.ggml.codec import decode, encode
from mmquant.quantize.ggml.types import GGMLType

STEPS = {
    "search": METHODS["fast"],
    "feedback": Method(correct=False, passes=0),
    "descent": Method(correct=False),
    "correction": Method(repair=False),
    "default": METHODS["default"],
    "damping.02": Method(damping=0.02),
    "prior.1": Method(prior=0.1),
    "prior1": Method(prior=1.0),
    "floor0": Method(floor=0.0),
    "sampling0": Method(sampling=0.0),
    "sampling1.5": Method(sampling=1.5),
    "damping.10": Method(damping=0.10),
}
ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


def tokens_of(path: str | None, side: str, windows: int) -> Tensor:
    if path is not None:
        return torch.from_numpy(np.load(path).astype(np.int64))[:windows]
    source = open_source("demo")
    return pack_windows(
        read_sets([str(bundled(side))], load_template(source)), load_tokenizer(source), 512, windows
    ).tokens


class Lab:
    """The demo model, its reference logits and the calibration windows on one device."""

    def __init__(self, calibration: Tensor, evaluation: Tensor, device: str) -> None:
        source = open_source("demo")
        self.g, self.device = source.geometry, device
        self.outside = read_globals(source, device)
        self.layers = [read_layer(source, layer, device) for layer in range(self.g.layers)]
        self.calibration, self.evaluation = calibration.to(device), evaluation.to(device)
        self.reference = self.hidden(self.outside, self.layers)

    def hidden(self, outside: Globals, layers: list[LayerWeights]) -> Tensor:
        parts = []
        for tokens in self.evaluation.split(16):
            hidden = embed(outside, tokens)
            for weights in layers:
                hidden = layer_forward(weights, self.g, hidden)
            parts.append(hidden)
        return torch.cat(parts)

    def distance(self, outside: Globals, layers: list[LayerWeights]) -> tuple[float, float]:
        """Mean KLD and top-1 agreement over the second half of each window."""
        half = self.evaluation.shape[1] // 2
        divergence, same = [], []
        for reference, found in zip(self.reference.split(4), self.hidden(outside, layers).split(4), strict=True):
            p = final_logits(self.outside, self.g, reference[:, half:-1]).log_softmax(-1)
            q = final_logits(outside, self.g, found[:, half:-1]).log_softmax(-1)
            divergence.append((p.exp() * (p - q)).sum(-1).flatten())
            same.append((p.argmax(-1) == q.argmax(-1)).float().flatten())
        return float(torch.cat(divergence).mean()), float(torch.cat(same).mean())

    def quantized(self, mix: str, method: Method) -> tuple[Globals, list[LayerWeights]]:
        types = tensor_types(find_mix(mix), self.g)
        n = self.g.hidden
        kind = GGMLType[types["token_embd.weight"]]
        written = decode(encode(self.outside.embed.float(), kind), kind, n)
        streams = self.streams(replace(self.outside, embed=written))
        layers, report = [], Report()
        for layer, weights in enumerate(self.layers):
            out = quantize_layer(streams, weights, layer, types, self.g, method, report)
            new = {"router": torch.from_numpy(out[f"blk.{layer}.ffn_gate_inp.weight"]).to(self.device)}
            for name, role in (ATTENTION_TENSORS | EXPERT_TENSORS).items():
                data = torch.from_numpy(out[f"blk.{layer}.{name}.weight"]).to(self.device)
                old = getattr(weights, ROLES.get(role, role))
                rows = data.reshape(-1, data.shape[-1])
                kind = GGMLType[types[f"blk.{layer}.{name}.weight"]]
                new[ROLES.get(role, role)] = decode(rows, kind, old.shape[-1]).view(old.shape)
            layers.append(replace(weights, **new))
        kind = GGMLType[types["output.weight"]]
        head = quantize_head(head_pair(streams, self.outside.norm, self.g), self.outside.head, types, method)
        head = decode(torch.from_numpy(head).to(self.device), kind, n)
        return Globals(written, self.outside.norm, head), layers

    def streams(self, outside: Globals) -> Streams:
        windows, length = self.calibration.shape
        sides = [HiddenStates(windows, length, self.g.hidden) for _ in range(2)]
        for hidden, side in zip(sides, (self.outside, outside), strict=True):
            hidden.put(0, embed(side, self.calibration))
        return Streams(sides[0], sides[1], 200 if self.device == "cuda" else 4, self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--evaluation-windows", type=int, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mix", nargs="*", default=["Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XXS"])
    parser.add_argument("--method", nargs="*", default=list(STEPS))
    options = parser.parse_args()
    device = options.device
    calibration = tokens_of(options.calibration, "calibration", options.windows)
    lab = Lab(calibration, tokens_of(options.evaluation, "evaluation", options.evaluation_windows), device)
    print(
        f"{device}, torch {torch.__version__}, calibration {list(lab.calibration.shape)}, {list(lab.evaluation.shape)}"
    )
    print(f"{'type':9} {'method':11} {'KLD':>9} {'top-1':>7} {'seconds':>8}")
    for mix in options.mix:
        for name in options.method:
            start = time.perf_counter()
            made = lab.quantized(mix, STEPS[name])
            seconds = time.perf_counter() - start
            divergence, same = lab.distance(*made)
            print(f"{mix:9} {name:11} {divergence:9.5f} {same:7.4f} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
