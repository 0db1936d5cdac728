"""Quantize a model by mmquant or as stock llama.cpp, and measure its KLD on each domain.

Everything is mmquant's own streamed forward in float32 (`mmquant eval` does the same; activations are not rounded), so
that one GPU judges a type in seconds. Stock is ggml's own encoder (`llamacpp.quantize`) under importance as
llama-imatrix collects it: unweighted sums of squares of each expert's rows, none for the head, ones where an expert
saw nothing.
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import _path  # noqa: F401  # pyright: ignore[reportUnusedImport]
import torch
from torch import Tensor

from mmquant.calibration.folder.high import SignRoundOptions, advance, sign_round_layer
from mmquant.calibration.folder.high import streams as learning_streams
from mmquant.calibration.folder.layer import as_read_back
from mmquant.calibration.folder.layer import quantize_layer as quantize_int4
from mmquant.calibration.folder.options import LayerOptions
from mmquant.calibration.gguf.layer import head_pair, quantize_head, quantize_layer
from mmquant.calibration.gguf.solve import Method, Report
from mmquant.calibration.gguf.streams import Streams
from mmquant.calibration.model.forward import Observer, embed, final_logits, layer_forward
from mmquant.calibration.model.hidden import HiddenStates
from mmquant.calibration.model.stream import Stream
from mmquant.calibration.statistics.collect import Collect
from mmquant.calibration.statistics.layer_pass import calibrate_layer, plan_moments
from mmquant.convert.gguf.mixes import find_mix, tensor_types
from mmquant.convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS
from mmquant.convert.models.layer import Globals, LayerWeights
from mmquant.convert.open import open_native
from mmquant.convert.source import read_globals, read_layer
from mmquant.quantize.ggml.codec import decode, encode
from mmquant.quantize.ggml.types import GGMLType
from mmquant.quantize.integer.rtn import dequantize, rtn_int

ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
BATCH = {"cuda": 48, "cpu": 4}  # windows at once
TENSORS = {
    name: ROLES.get(role, role) for name, role in (ATTENTION_TENSORS | EXPERT_TENSORS).items()
}  # GGUF name -> field of LayerWeights
Whole = tuple[Globals, list[LayerWeights]]


@dataclass(frozen=True)
class Distance:
    """By position [W, T/2] of one domain: Kullback-Leibler divergence, loss of both models, whether top-1 agrees."""

    kld: Tensor
    loss: Tensor
    reference_loss: Tensor
    agree: Tensor

    def row(self) -> dict[str, float]:
        """The figures of a table."""
        flat = self.kld.flatten()
        return {
            "kld": float(flat.mean()),
            "p999": float(flat.quantile(0.999)),
            "max": float(flat.max()),
            "ppl_ratio": float((self.loss - self.reference_loss).mean().exp()),
            "top1": float(self.agree.mean()),
        }


class Importance(Observer):
    """Sums of squares of what enters each matrix of a layer, as llama-imatrix has them."""

    def __init__(self, experts: int) -> None:
        self.sums: dict[str, Tensor] = {}
        self.experts_seen = torch.zeros(experts)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def attention_input(self, x: Tensor) -> None:
        self._add("attention_in", x.square().mean(0, keepdim=True))

    def attention_output(self, x: Tensor) -> None:
        self._add("attn_output", x.square().mean(0, keepdim=True))

    def experts(self, x: Tensor, h: Tensor, y: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
        count = torch.tensor(offsets).diff()
        owner = torch.repeat_interleave(torch.arange(len(count)), count).to(x.device)
        for name, rows in (("x", x), ("h", h)):
            sums = torch.zeros(len(count), rows.shape[1], device=x.device).index_add_(0, owner, rows.float().square())
            self._add(name, sums)
        self.experts_seen += count

    def of(self, name: str) -> Tensor:
        """[E or 1, n] float32 on the CPU for a GGUF tensor."""
        if name in ("attn_q", "attn_k", "attn_v"):
            return self.sums["attention_in"].cpu()
        if name == "attn_output":
            return self.sums["attn_output"].cpu()
        sums = self.sums["h" if name == "ffn_down_exps" else "x"].cpu()
        mean = sums / self.experts_seen.clamp(min=1).unsqueeze(1)
        return torch.where(self.experts_seen.unsqueeze(1) > 0, mean, torch.ones_like(mean))


class Lab:
    """A model, its own predictions on each domain's windows [W, T], and ways to quantize it."""

    def __init__(self, model: str | Path, judged: dict[str, Tensor], device: str) -> None:
        self.source = open_native(str(model))
        self.g, self.device = self.source.geometry, device
        self.batch = BATCH[torch.device(device).type]
        self.dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.outside = read_globals(self.source, device)
        self.layers = [read_layer(self.source, layer, device) for layer in range(self.g.layers)]
        self.judged = {name: tokens.to(device) for name, tokens in judged.items()}
        self.reference = {name: self._hidden((self.outside, self.layers), t) for name, t in self.judged.items()}

    def layer(self, number: int) -> LayerWeights:
        """A layer's weights as a pass computes with them (bfloat16 on a GPU)."""
        return read_layer(self.source, number, self.device, self.dtype)

    @torch.no_grad()
    def _hidden(self, model: Whole, tokens: Tensor) -> Tensor:
        parts = []
        for part in tokens.split(self.batch):
            hidden = embed(model[0], part)
            for weights in model[1]:
                hidden = layer_forward(weights, self.g, hidden)
            parts.append(hidden)
        return torch.cat(parts)

    @torch.no_grad()
    def distance(self, model: Whole) -> dict[str, Distance]:
        """Of every judged domain, second half of each window."""
        found: dict[str, Distance] = {}
        for name, tokens in self.judged.items():
            half = tokens.shape[1] // 2
            parts: list[tuple[Tensor, ...]] = []
            pairs = zip(
                self.reference[name].split(4), self._hidden(model, tokens).split(4), tokens.split(4), strict=True
            )
            for reference, other, ids in pairs:
                p = final_logits(self.outside, self.g, reference[:, half:-1]).log_softmax(-1)
                q = final_logits(model[0], self.g, other[:, half:-1]).log_softmax(-1)
                target = ids[:, half + 1 :].unsqueeze(-1)
                kld = (p.exp() * (p - q)).sum(-1)
                same = (p.argmax(-1) == q.argmax(-1)).float()
                parts.append((kld, -q.gather(-1, target)[..., 0], -p.gather(-1, target)[..., 0], same))
            kld, loss, reference_loss, agree = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
            found[name] = Distance(kld, loss, reference_loss, agree)
        return found

    def streams(self, tokens: Tensor, outside: Globals) -> Streams:
        """The two residual streams of the calibration windows before the first layer."""
        tokens = tokens.to(self.device)
        windows, length = tokens.shape
        sides = [HiddenStates(windows, length, self.g.hidden, device=self.device) for _ in range(2)]
        for hidden, side in zip(sides, (self.outside, outside), strict=True):
            hidden.put(0, embed(side, tokens))
        return Streams(sides[0], sides[1], self.batch, self.device)

    def gguf(self, mix: str, method: Method, tokens: Tensor, report: Report | None = None) -> Whole:
        """Quantized by us, decoded, float32."""
        types = tensor_types(find_mix(mix), self.g)
        kind = GGMLType[types["token_embd.weight"]]
        written = decode(encode(self.outside.embed.float(), kind), kind, self.g.hidden)
        streams = self.streams(tokens, replace(self.outside, embed=written))
        layers, report = [], report if report is not None else Report()
        for layer, exact in enumerate(self.layers):
            out = quantize_layer(streams, self.layer(layer), layer, types, self.g, method, report)
            out = {name: torch.from_numpy(data) for name, data in out.items()}
            new = {"router": out[f"blk.{layer}.ffn_gate_inp.weight"].to(self.device)}
            new |= {
                role: self._decoded(out, layer, name, types, getattr(exact, role)) for name, role in TENSORS.items()
            }
            layers.append(replace(exact, **new))
        kind = GGMLType[types["output.weight"]]
        head = quantize_head(head_pair(streams, self.outside.norm, self.g), self.outside.head, types, method)
        head = decode(torch.from_numpy(head).to(self.device), kind, self.g.hidden)
        return Globals(written, self.outside.norm, head), layers

    def _decoded(self, out: dict[str, Tensor], layer: int, name: str, types: dict[str, str], like: Tensor) -> Tensor:
        data = out[f"blk.{layer}.{name}.weight"].to(self.device)
        kind = GGMLType[types[f"blk.{layer}.{name}.weight"]]
        return decode(data.reshape(-1, data.shape[-1]), kind, like.shape[-1]).view(like.shape)

    @torch.no_grad()
    def importance(self, tokens: Tensor) -> list[Importance]:
        """llama-imatrix's sums of a text, by layer."""
        found = [Importance(self.g.experts) for _ in self.layers]
        for part in tokens.to(self.device).split(self.batch):
            hidden = embed(self.outside, part)
            for weights, watch in zip(self.layers, found, strict=True):
                hidden = layer_forward(weights, self.g, hidden, watch)
        return found

    def stock(self, mix: str, importance: list[Importance], threads: int) -> Whole:
        """As llama-quantize writes it, decoded."""
        types = tensor_types(find_mix(mix), self.g)
        with ThreadPoolExecutor(threads) as pool:

            def whole(name: str, weight: Tensor, known: Tensor | None) -> Tensor:
                kind = GGMLType[types[name]]
                known = None if known is None else known.expand(weight.shape[0], -1)
                pieces = [
                    pool.submit(_stock_bytes, kind, rows, None if known is None else known[e])
                    for e, matrix in enumerate(weight.cpu())
                    for rows in matrix.split(
                        max(64, matrix.shape[0] // threads) if len(weight) == 1 else matrix.shape[0]
                    )
                ]
                data = torch.cat([piece.result() for piece in pieces]).to(self.device)
                return decode(data, kind, weight.shape[-1]).view(weight.shape)

            layers = []
            for number, (exact, seen) in enumerate(zip(self.layers, importance, strict=True)):
                new: dict[str, Tensor] = {}
                for name, role in TENSORS.items():
                    weight = getattr(exact, role)
                    stacked = weight if weight.dim() == 3 else weight.unsqueeze(0)
                    new[role] = whole(f"blk.{number}.{name}.weight", stacked, seen.of(name)).view(weight.shape)
                layers.append(replace(exact, **new))
            ones = torch.ones(1, self.g.hidden)
            embedding, head = (
                whole(name, w.float().unsqueeze(0), ones if types[name] in NEEDS else None)[0]
                for name, w in (("token_embd.weight", self.outside.embed), ("output.weight", self.outside.head))
            )
        return Globals(embedding, self.outside.norm, head), layers

    def nearest(self) -> Whole:
        """INT4 rounded to nearest in groups of 128 under ranges that are searched; attention stays."""
        layers = []
        for exact in self.layers:
            new = {n: dequantize(rtn_int(getattr(exact, n), LayerOptions().grid.bits)) for n in ("gate", "up", "down")}
            layers.append(replace(exact, **new))
        return self.outside, layers

    def int4(self, options: LayerOptions, tokens: Tensor) -> Whole:
        """INT4 by us, attention as the options say; the head and embeddings stay (high effort repairs routers)."""
        stream = Stream(self.source, tokens, device=self.device, dtype=self.dtype, batch=self.batch, folder=None)
        stream.start(0)
        reference, learning = HiddenStates(*stream.hidden.shape, device=self.device), SignRoundOptions()
        reference.all().copy_(stream.hidden.all())
        collect, learned = Collect(full=options.full), options.sign_rounded
        domain, layers = torch.zeros(len(tokens), dtype=torch.int64), []
        plan = plan_moments(self.g, collect, 1 << 40)
        for number, exact in enumerate(self.layers):
            weights = self.layer(number)
            statistics = calibrate_layer(
                stream, weights, domain, 1, collect, plan, advance=not learned, hold=options.full and not learned
            )
            made = quantize_int4(number, weights, statistics, options, self.g)
            if learned:
                both = learning_streams(reference, stream.hidden, learning, torch.device(self.device))
                made, _ = sign_round_layer(weights, self.g, made, both, learning)
                stream.advance(as_read_back(weights, made))
                advance(weights, self.g, reference)
            layers.append(as_read_back(exact, made))
            gc.collect()
        return self.outside, layers


NEEDS = ("IQ2_XXS", "IQ2_XS", "IQ1_S")  # ggml refuses them without an importance


def _stock_bytes(kind: GGMLType, rows: Tensor, importance: Tensor | None) -> Tensor:
    from mmquant.runs.evaluation import llamacpp  # type: ignore[attr-defined]

    known = None if importance is None else importance.contiguous().numpy()
    return torch.from_numpy(llamacpp.quantize(int(kind), rows.contiguous().numpy(), known))
