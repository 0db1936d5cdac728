"""INT4 of one M2.7-size layer from FP8 files to INT4 files: each part with its floor, and the shipped step.

    python bench/int4_whole.py [--tokens 524288] [--effort high] [--device cuda] [--folder DIR]

Writes a checkpoint of two layers with random weights (7.4 GB) into a temporary folder (on --folder's disk), then with
the first: read FP8, dequantize, forward of all tokens, moments, solve, pack, write. Reading is from the page cache; the
floor is what storage delivers (--storage). The last lines are the shipped step of the second layer (the first also
embeds the text and compiles), 62 such steps, and the allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import _path  # noqa: F401
import torch
from safetensors.torch import save_file

from mmquant.calibration.folder.layer import quantize_layer
from mmquant.calibration.folder.options import LayerOptions
from mmquant.calibration.folder.variant import CalibratedWeights
from mmquant.calibration.model.forward import layer_forward
from mmquant.calibration.statistics.layer_pass import calibrate_layer
from mmquant.calibration.statistics.live import LivePass, PassOptions, default_dtype, moment_plan
from mmquant.calibration.text.corpus import Corpus
from mmquant.convert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmquant.convert.folder.writer import FolderWriter
from mmquant.convert.models import geometry
from mmquant.convert.models.minimax_m2 import Geometry
from mmquant.convert.models.shapes import global_shapes, matrix_shapes, plain_shapes
from mmquant.convert.source import read_layer
from mmquant.quantize.integer.gptq_grid import GptqGrid
from mmquant.runs.folder_steps import prepare, step_tensors

LAYERS = 62
SHARD = 1 << 30
RATES = {
    "storage": (3e9, "bytes/s that storage delivers"),
    "memory": (4.8e12, "bytes/s of the device's memory"),
    "link": (55e9, "bytes/s from the device to the host"),
    "products": (800e12, "operations/s of matrix products in the forward's dtype"),
    "float32": (60e12, "operations/s of float32 products"),
}


def config(a: argparse.Namespace) -> dict:
    """config.json of a checkpoint with two layers and a small vocabulary."""
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "hidden_size": a.hidden,
        "intermediate_size": a.width,
        "num_hidden_layers": 2,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.heads // a.group_of_heads,
        "head_dim": a.head_dim,
        "rotary_dim": a.head_dim // 2,
        "num_local_experts": a.experts,
        "num_experts_per_tok": a.chosen,
        "vocab_size": 1024,
        "max_position_embeddings": a.context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [128, 128]},
    }


def tensors(g: Geometry, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Random tensors of the release's names, FP8 in tiles of 128."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for name, shape in {**global_shapes(g), **dict(plain_shapes(g, 0)), **dict(plain_shapes(g, 1))}.items():
        value = draw(*shape) * 0.05 + (1.0 if "norm" in name else 0.0)
        yield name, value.to(torch.bfloat16) if "norm" in name or "layers" not in name else value
    for name, (rows, cols) in (*matrix_shapes(g, 0), *matrix_shapes(g, 1)):
        yield name + ".weight", (draw(rows, cols) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)
        tiles = torch.full((-(-rows // 128), -(-cols // 128)), 1 / (64 * cols**0.5))
        yield name + ".weight_scale_inv", tiles


def make_checkpoint(folder: Path, a: argparse.Namespace) -> Checkpoint:
    """Both layers in shards of a gibibyte."""
    folder.mkdir()
    settings, shards, size = config(a), [{}], 0
    for name, value in tensors(Geometry.from_config(settings), a.device):
        if size > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name] = value.cpu().contiguous()
        size += value.nbytes
    table = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file)
        table |= dict.fromkeys(shard, file)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return open_checkpoint(folder)


class Clock:
    """Seconds of work, the device waited for; the second of two runs where `twice`."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def __call__(self, work: Callable[[], object], twice: bool = False) -> float:
        if twice:
            work()
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def floors(
    g: geometry.Geometry, source: Checkpoint, tokens: int, written: int, rate: dict[str, float]
) -> dict[str, float]:
    """Seconds that no implementation can beat for one layer, by part."""
    stored = source.bytes / source.geometry.layers
    experts = 3 * g.experts * g.hidden * g.expert_width
    attention = g.hidden * g.head_dim * 2 * (g.heads + g.kv_heads)
    rows = tokens * g.experts_per_token
    forward = 2 * (rows * 3 * g.hidden * g.expert_width + tokens * attention)
    grams = 2 * rows * (g.hidden**2 + g.expert_width**2)
    solving = 0.0
    for outputs, n in ((2 * g.expert_width, g.hidden), (g.hidden, g.expert_width)):
        solving += g.experts * (n**3 / 3 + outputs * n * n) / rate["float32"]
    return {
        "read FP8, dequantize": stored / rate["storage"],  # the copy to the device goes on beside it
        "forward": forward / rate["products"],
        "moments": grams / rate["products"],
        "solve": solving,
        "pack": 1.5 * experts / rate["memory"],
        "write": written / rate["link"] + written / rate["storage"],
    }


def parts(
    source: Checkpoint, live: LivePass, variant: CalibratedWeights, folder: Path, clock: Clock
) -> dict[str, float]:
    """Seconds of each part, run one after another."""
    device, dtype = live.options.device, live.options.dtype
    found = {"read FP8, dequantize": clock(lambda: read_layer(source, 0, device, dtype), twice=True)}
    weights, stream = read_layer(source, 0, device, dtype), live.stream
    stream.start(0)

    def forward() -> None:
        for _, values in stream.hidden.batches(stream.batch, stream.device):
            layer_forward(weights, source.geometry, values)

    found["forward"] = clock(forward, twice=True)
    plan, results = moment_plan(source, live.options, live.corpus.tokens.numel()), []

    def moments() -> None:
        results[:] = [
            calibrate_layer(stream, weights, live.corpus.domain, 1, live.options.collect, plan, advance=False)
        ]

    found["moments"] = clock(moments, twice=True) - found["forward"]

    solved = []

    def solve() -> None:
        solved[:] = [quantize_layer(0, weights, results[0], variant.options, source.geometry)]

    found["solve"] = clock(solve, twice=True)
    packed = {}
    variant.packed_experts(solved[0], source.names, 0)  # the first call takes pinned memory that later ones find again
    found["pack"] = clock(lambda: packed.update(variant.packed_experts(solved[0], source.names, 0)))
    steps = [[s for s in variant.specs(source, 0) if s.name in packed]]
    found["write"] = clock(lambda: written(FolderWriter(folder, steps, {}), 0, packed))
    return found


def written(writer: FolderWriter, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """A step's tensors, durable."""
    writer.write(step, tensors)
    writer.settle()


def shipped(source: Checkpoint, live: LivePass, variant: CalibratedWeights, folder: Path, clock: Clock) -> float:
    """Seconds of the second layer's step as `mmquant int4` runs it."""
    if torch.device(live.options.device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps = prepare(source, variant).steps
    writer = FolderWriter(folder, steps, {})
    for step in (0, 1):
        written(writer, step, step_tensors(source, variant, step, live.options.device, live))
    seconds = clock(lambda: written(writer, 2, step_tensors(source, variant, 2, live.options.device, live)))
    writer.close()
    live.stop()
    return seconds


def show(found: dict[str, float], least: dict[str, float]) -> None:
    """The table."""
    print(f"{'part':28} {'seconds':>9} {'floor':>9}")
    for name, taken in found.items():
        print(f"{name:28} {taken:9.3f} {least[name]:9.3f}")
    print(f"{'sum':28} {sum(found.values()):9.3f} {sum(least.values()):9.3f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 3072, "width": 1536, "experts": 256, "chosen": 8, "heads": 48, "group-of-heads": 6}
    sizes |= {"head-dim": 128, "tokens": 1 << 19, "context": 2048, "group": 128}
    for name, usual in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    for name, (usual, words) in RATES.items():
        parser.add_argument(f"--{name}", type=float, default=usual, help=f"{words}, for the floors")
    parser.add_argument("--effort", choices=["default", "high"], default="default", help="high: the shipped step alone")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="where the temporary folder lies")
    return parser.parse_args()


def main() -> None:
    a = arguments()
    clock, cuda = Clock(a.device), torch.device(a.device).type == "cuda"
    print(torch.cuda.get_device_name() if cuda else "CPU", "torch", torch.__version__)
    with tempfile.TemporaryDirectory(dir=a.folder) as temporary:
        folder = Path(temporary)
        source = make_checkpoint(folder / "model", a)
        tokens = torch.randint(0, 1024, (a.tokens // a.context, a.context), generator=torch.Generator().manual_seed(0))
        corpus = Corpus(tokens, torch.zeros(len(tokens), dtype=torch.int64), ("random",), {})
        options = PassOptions(device=a.device, dtype=default_dtype(a.device))
        high = a.effort == "high"
        chosen = LayerOptions(grid=GptqGrid(4, a.group), effort=a.effort)
        variant = CalibratedWeights(a.group, options=chosen, report=lambda line: None)
        (folder / "parts").mkdir()
        if high:
            options = replace(options, propagate="quantized")
        else:
            found = parts(source, LivePass(source, corpus, options), variant, folder / "parts", clock)
            written = sum(s.bytes for s in variant.specs(source, 0))
            least = floors(source.geometry, source, tokens.numel(), written, {name: getattr(a, name) for name in RATES})
            show(found, least)
        for hold in [False] if high else [False, True]:
            (folder / f"whole-{hold}").mkdir()
            live = LivePass(source, corpus, replace(options, hold=hold), hidden=high)
            whole = shipped(source, live, variant, folder / f"whole-{hold}", clock)
            which = "with" if hold else "without"
            print(f"the shipped step {which} held-out rows {whole:.3f} s, {LAYERS} layers {LAYERS * whole:.0f} s")
        if cuda:
            print(f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB by the allocator")


if __name__ == "__main__":
    main()
