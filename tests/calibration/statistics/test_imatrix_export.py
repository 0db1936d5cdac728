"""Sums of x^2 equal those of transformers' modules and (with MMQUANT_GOLDEN) of llama-imatrix."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.calibration_cases import corpus, model, options
from helpers.paths import DATA
from helpers.transformers_model import in_transformers
from mmquant.calibration.statistics.collect import Collect
from mmquant.calibration.statistics.imatrix_export import imatrix_of_layers
from mmquant.calibration.statistics.layer import LayerStatistics
from mmquant.calibration.statistics.live import LivePass
from mmquant.calibration.text.corpus import pack_windows, read_sets
from mmquant.calibration.text.tokenizer import load_tokenizer
from mmquant.convert.checkpoints.checkpoint import Checkpoint
from mmquant.convert.gguf.imatrix import Imatrix, read_imatrix
from mmquant.convert.open import open_native
from mmquant.convert.source import read_layer


def layers(source: Checkpoint, text: object, **changes: object) -> list[LayerStatistics]:
    live = LivePass(source, text, options(**changes))  # type: ignore[arg-type]
    return [live.layer(n).statistics for n in range(source.geometry.layers)]


def of_transformers(source: Checkpoint, tokens: torch.Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """GGUF name -> (sums of x^2 [matrices, inputs], rows) by hooks on transformers' modules in float32."""
    network = in_transformers(source)
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, *rest: seen[name].append(args[0].detach().double().flatten(0, -2))

    chosen: dict[int, torch.Tensor] = {}
    for n, block in enumerate(network.model.layers):
        for part in ("q", "k", "v"):
            getattr(block.self_attn, f"{part}_proj").register_forward_pre_hook(keep(f"{n}.attn_{part}"))
        block.self_attn.o_proj.register_forward_pre_hook(keep(f"{n}.attn_output"))
        block.mlp.gate.register_forward_pre_hook(keep(f"{n}.ffn_gate_inp"))
        block.mlp.gate.register_forward_hook(lambda module, args, out, n=n: chosen.update({n: out[2]}))
    with torch.no_grad():
        network(tokens)
    out = {}
    for name, parts in seen.items():
        number, short = name.split(".")
        x = torch.cat(parts)
        out[f"blk.{name}.weight"] = (x.square().sum(0)[None].numpy(), np.array([len(x)]))
        if short == "ffn_gate_inp":
            layer, experts = read_layer(source, int(number)), source.geometry.experts
            rows = [x[(chosen[int(number)] == e).any(1)] for e in range(experts)]
            wide = [r.square().sum(0).numpy() for r in rows]
            mid = []
            for e, r in enumerate(rows):
                gate, up = r @ layer.gate[e].double().T, r @ layer.up[e].double().T
                mid.append((gate * torch.sigmoid(gate) * up).square().sum(0).numpy())
            counts = np.array([len(r) for r in rows])
            out |= {f"blk.{number}.{w}.weight": (np.stack(wide), counts) for w in ("ffn_gate_exps", "ffn_up_exps")}
            out[f"blk.{number}.ffn_down_exps.weight"] = (np.stack(mid), counts)
    return out


def test_the_sums_are_those_of_transformers(tmp_path: Path) -> None:
    source, text = open_native(model(tmp_path)), corpus()
    ours = imatrix_of_layers(layers(source, text), ["tokens"], 7, 12)
    theirs = of_transformers(source, text.tokens)
    assert set(ours.weights) == set(theirs)
    for name, (sums, counts) in theirs.items():
        assert np.array_equal(ours.weights[name].counts, counts), name
        np.testing.assert_allclose(ours.weights[name].sums, sums, rtol=2e-4, atol=1e-5 * sums.max(), err_msg=name)


def distance(ours: Imatrix, theirs: Imatrix) -> dict[str, tuple[float, float]]:
    """Kind of weight -> largest relative L2 distance of E[x^2] over layers, share of rows that went elsewhere."""
    worst: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for name, value in theirs.weights.items():
        mine, kind = ours.weights[name], name.split(".")[2]
        error = float(np.linalg.norm(mine.mean() - value.mean()) / np.linalg.norm(value.mean()))
        moved = float(np.abs(mine.counts - value.counts).sum() / 2 / value.counts.sum())
        worst[kind] = (max(worst[kind][0], error), max(worst[kind][1], moved))
    return dict(worst)


@pytest.mark.slow
def test_the_demo_agrees_with_llama_imatrix() -> None:
    """The text of that run may not be shipped: MMQUANT_GOLDEN names a folder with llama.cpp/calibration.txt."""
    folder = os.environ.get("MMQUANT_GOLDEN")
    if folder is None:
        pytest.skip("MMQUANT_GOLDEN is not set")
    source = open_native("demo")
    sets = read_sets([str(Path(folder) / "llama.cpp" / "calibration.txt")])
    text = pack_windows(sets, load_tokenizer(source), 512, 200)
    found = layers(source, text, collect=Collect(full=False), batch=16)
    theirs = read_imatrix(DATA / "imatrix.gguf")
    for kind, (error, moved) in sorted(distance(imatrix_of_layers(found, ["c"], 200, 512), theirs).items()):
        print(f"{kind}: relative L2 {error:.4%}, rows elsewhere {moved:.4%}")
        assert error < 0.03, kind
        assert moved < 0.01, kind
