"""Layers of M2.7's size on one rank and on several: seconds by stage, efficiency, bytes moved, who waits for whom.

    python bench/multi_gpu.py [--ranks 1 2] [--folder /dev/shm] [--json FILE]

Writes a checkpoint of two layers with random weights (7.4 GB), then runs it under torchrun with each number of ranks:
the first layer compiles, the second is measured. Stages: a layer's weights (every rank reads its share), forward with
second moments, their sums to the owners, INT4 and NVFP4 solves, packing, a GGUF layer with both streams, evaluation
of two candidates, and the forward once more on windows of 16,384 tokens. A stage begins when all ranks are there and
ends for each when its device is done. What a rank spends in calls of torch.distributed is told apart: the least of the
ranks is moving data, what others spend beyond it is waiting. Results of all numbers of ranks are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import numpy as np
import torch
from _ranks_clock import Clock
from _ranks_report import report
from int4_whole import make_checkpoint
from torch import Tensor

from mmquant.calibration.evaluate.settings import Settings
from mmquant.calibration.evaluate.streamed import Scoring
from mmquant.calibration.folder.layer import QuantizedLayer, quantize_layer
from mmquant.calibration.folder.options import LayerOptions
from mmquant.calibration.folder.variant import CalibratedWeights
from mmquant.calibration.gguf import experts as gguf_experts
from mmquant.calibration.gguf import layer as gguf_layer
from mmquant.calibration.gguf.memory import moment_memory, stream_place, text_batch
from mmquant.calibration.gguf.moments import Pair
from mmquant.calibration.gguf.solve import METHODS, Report
from mmquant.calibration.gguf.streams import Streams
from mmquant.calibration.model.distributed import current_ranks, leave, rank_device, rank_share, sum_everywhere, world
from mmquant.calibration.model.hidden import HiddenStates
from mmquant.calibration.model.reading import read_layer_shared
from mmquant.calibration.model.stream import Stream
from mmquant.calibration.statistics.collect import Collect
from mmquant.calibration.statistics.layer import LayerStatistics
from mmquant.calibration.statistics.layer_pass import calibrate_layer, sum_over_ranks
from mmquant.calibration.statistics.live import PassOptions, default_dtype, moment_plan
from mmquant.calibration.text.sample import Sample
from mmquant.convert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmquant.convert.files.atomic import write_whole
from mmquant.convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS
from mmquant.convert.models.layer import LayerWeights
from mmquant.quantize.fp4.grid import NVFP4
from mmquant.quantize.integer.gptq_grid import GptqGrid

# The parts of a GGUF layer that send the text through it
TEXT = {
    gguf_layer: ("input_pair", "output_pair", "pass_attention", "router_pair", "pass_experts"),
    gguf_experts: ("input_pairs", "leaving_pairs"),
}
STAGES = ("weights", "int4", "nvfp4", "gguf", "eval", "long")


class Rounded(Checkpoint):
    """A candidate: the experts of the same model on a grid of few steps a row."""

    steps = 7.0

    def read_experts(
        self, layer: int, projection: str, experts: range, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        values = super().read_experts(layer, projection, experts, device, dtype)
        for matrix in values:
            scale = matrix.float().abs().amax(1, keepdim=True) / self.steps
            matrix.copy_((matrix / scale).round() * scale)
        return values


class Worker:
    """One rank's work over both layers."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, (self.rank, self.size) = a, world()
        self.device = rank_device(a.device)
        self.clock, self.source = Clock(self.device), open_checkpoint(a.folder / "model")
        self.dtype, self.results = default_dtype(self.device), dict[str, Any]()
        self.g = self.source.geometry

    def run(self) -> dict[str, Any]:
        """Stages of the second layer, by rank, and results to compare."""
        if {"int4", "nvfp4"} & set(self.a.stages):
            self.folders()
        if "gguf" in self.a.stages:
            self.gguf()
        if "eval" in self.a.stages:
            self.evaluation()
        if "long" in self.a.stages:
            self.long()
        memory = [host_memory(), torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0]
        every = current_ranks().gather((self.clock.found, memory))
        return {"ranks": self.size, "stages": [one[0] for one in every], "memory": [one[1] for one in every]} | {
            "results": self.results
        }

    def tokens(self, windows: int, context: int) -> Tensor:
        return torch.randint(0, self.g.vocab, (windows, context), generator=torch.Generator().manual_seed(0))

    def stream(self, windows: int, context: int) -> Stream:
        stream = Stream(self.source, self.tokens(windows, context), device=self.device, dtype=self.dtype)
        stream.start(0)
        return stream

    def moments(self, stream: Stream, layer: int, weights: LayerWeights, name: str) -> LayerStatistics:
        """Forward with moments, of which the owners get the sums."""
        options = PassOptions(device=self.device, dtype=self.dtype)
        plan = moment_plan(self.source, options, stream.tokens.numel())
        domain = torch.zeros(len(stream.own), dtype=torch.int64)
        with self.clock.stage(f"{name}: forward, moments"):
            found = calibrate_layer(stream, weights, domain, 1, Collect(), plan, hold=self.a.hold)
        with self.clock.stage(f"{name}: sums to owners"):
            return sum_over_ranks(found)

    def forget_first(self, layer: int) -> None:
        """What the first layer took is compiling."""
        if layer == 0:
            self.clock.found = {n: v for n, v in self.clock.found.items() if n in self.kept}

    def folders(self) -> None:
        """INT4 and NVFP4 of the layer from the same moments."""
        self.kept = set(self.clock.found)
        stream = self.stream(self.a.windows, self.a.context)
        for layer in range(2):
            with self.clock.stage("a layer's weights"):
                weights = read_layer_shared(self.source, layer, self.device, self.dtype)
            statistics = self.moments(stream, layer, weights, "calibrate")
            for name, grid in (("int4", GptqGrid(4, 128)), ("nvfp4", NVFP4)):
                if name not in self.a.stages:
                    continue
                options = LayerOptions(grid=grid)
                with self.clock.stage(f"{name}: solves, results to all"):
                    found = quantize_layer(layer, weights, statistics, options, self.g)
                if layer:
                    self.results[name] = losses(found, weights, statistics)
                if name == "int4":
                    with self.clock.stage("int4: packing (first rank)"):
                        if self.rank == 0:
                            CalibratedWeights(128, options=options).packed_experts(found, self.source.names, layer)
                del found
            if layer:
                self.results["moments"] = sums_of(statistics)
            del weights, statistics
            self.forget_first(layer)

    def gguf(self) -> None:
        """A layer with both streams, all matrices of one type."""
        self.kept = set(self.clock.found)
        windows, context, g = self.a.windows, self.a.context, self.g
        own, batch = rank_share(windows, self.rank, self.size), text_batch(context, self.device)
        size = 2 * 4 * max(1, len(own)) * context * g.hidden
        memory = moment_memory(g, self.dtype, self.device, batch * context)
        place = stream_place(g, self.device, memory, size)
        memory -= 0 if place.type == "cpu" else size
        states = [HiddenStates(len(own), context, g.hidden, device=place) for _ in range(2)]
        entering = self.stream(windows, context).hidden.all()
        for state in states:
            state.all().copy_(entering)
        del entering
        both = Streams(states[0], states[1], batch, self.device, memory)
        rounded = self.clock.timed("gguf:   of it solves of experts", gguf_experts.rounded_part)
        gguf_experts.rounded_part = rounded
        gguf_layer.solve = self.clock.timed("gguf:   of it solves of attention", gguf_layer.solve)
        for module, names in TEXT.items():
            for name in names:
                setattr(module, name, self.clock.timed(f"gguf:   of it {name}", getattr(module, name)))
        Pair.over_ranks = self.clock.timed("gguf:   of it sums to owners", Pair.over_ranks)  # type: ignore[method-assign]
        kind = {name + ".weight": self.a.kind for name in (*ATTENTION_TENSORS, *EXPERT_TENSORS)}
        for layer in range(2):
            weights = read_layer_shared(self.source, layer, self.device, self.dtype)
            types = {f"blk.{layer}.{name}": value for name, value in kind.items()}
            with self.clock.stage(f"gguf: the layer in {self.a.kind}"):
                gguf_layer.quantize_layer(both, weights, layer, types, g, METHODS["default"], Report())
            self.forget_first(layer)
        lost = sum_everywhere((states[1].all().double() - states[0].all().double()).square().sum().cpu())
        size_of = sum_everywhere(states[0].all().double().square().sum().cpu())
        self.results["gguf"] = [float(lost / size_of)]

    def evaluation(self) -> None:
        """Both candidates beside the reference."""
        self.kept = set(self.clock.found)
        tokens = self.tokens(self.a.judged, self.a.context)
        zeros = np.zeros(len(tokens), dtype=np.int64)
        sample = Sample(tokens, zeros, zeros, zeros, ("random",), (), "all", self.a.context)
        candidates: list[Any] = [Rounded(self.source.store), Rounded(self.source.store)]
        candidates[1].steps = 3.0
        settings = Settings(str(self.device), self.dtype, max(16384, self.a.context))
        scoring = Scoring(self.source, candidates, sample, settings, ranks=current_ranks())
        scoring.begin()
        for layer in range(2):
            with self.clock.stage("eval: the layer of three models"):
                scoring.advance(layer)
            self.forget_first(layer)
        with self.clock.stage("eval: heads and metrics, once a run"):
            outcomes = scoring.finish()
        self.results["eval"] = [float(outcome.scores.kld.mean()) for outcome in outcomes]

    def long(self) -> None:
        """The forward on few long windows."""
        self.kept = set(self.clock.found)
        context = min(16384, self.a.context * 8)
        stream = self.stream(max(2, self.a.windows * self.a.context // context), context)
        for layer in range(2):
            weights = read_layer_shared(self.source, layer, self.device, self.dtype)
            self.moments(stream, layer, weights, f"windows of {context}")
            del weights
            self.forget_first(layer)


def losses(found: QuantizedLayer, weights: LayerWeights, statistics: LayerStatistics) -> list[float]:
    """Relative squared error of this layer's matrices, weighed by what they saw, over all experts."""
    from mmquant.quantize.integer.grid import dequantize, select

    out = []
    for name, moments in (("gate", statistics.expert_in), ("down", statistics.expert_mid)):
        lost = total = 0.0
        for expert in range(0, len(weights.gate), max(1, len(weights.gate) // 16)):
            exact = getattr(weights, name)[expert].float()
            error = exact - dequantize(select(found.experts[name], expert))
            weight = moments.diagonal[expert].to(exact.device)
            lost += float((error.square() * weight).sum())
            total += float((exact.square() * weight).sum())
        out.append(lost / total)
    return out


def sums_of(statistics: LayerStatistics) -> list[float]:
    """Numbers that stand for the moments of all experts."""
    parts = (statistics.expert_in, statistics.expert_mid, statistics.attention_in, statistics.attention_out)
    return [float(part.diagonal.double().sum()) for part in parts]


def host_memory() -> list[int]:
    """RSS and PSS of this process in bytes: shared pages count in full, or by their share."""
    with open("/proc/self/smaps_rollup") as file:
        lines = {line.split(":")[0]: line.split() for line in file}
    return [int(lines[name][1]) * 1024 for name in ("Rss", "Pss")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 3072, "width": 1536, "experts": 256, "chosen": 8, "heads": 48, "group-of-heads": 6}
    sizes |= {"head-dim": 128, "context": 2048, "windows": 128, "judged": 64}
    for name, usual in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--kind", default="Q4_K", help="type of the GGUF layer")
    parser.add_argument("--hold", action="store_true", help="hold rows out: random ones turn most matrices away")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="where the checkpoint lies for the time")
    parser.add_argument("--json", type=Path, help="where all numbers go")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def work(a: argparse.Namespace) -> None:
    """One rank; without a model in its folder it makes one."""
    if not (a.folder / "model").exists():
        make_checkpoint(a.folder / "model", a)
        return
    found = Worker(a).run()
    if world()[0] == 0:
        a.worker.write_text(json.dumps(found))
    leave()


def launch(command: list[str], ranks: int) -> None:
    """This file as a worker, under torchrun where there are several."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29511"]
    # Multicast through NVLink is left alone: a program that uses it can take down a shared host's cards.
    quiet = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
    subprocess.run([*start, *command], check=True, env={"OMP_NUM_THREADS": "8", **quiet, **os.environ, **quiet})


def main() -> None:
    a = arguments()
    if a.worker is not None:
        work(a)
        return
    runs = []
    with tempfile.TemporaryDirectory(dir=a.folder, prefix="mmquant-bench-") as folder:
        out = Path(folder) / "found.json"
        command = [__file__, *sys.argv[1:], "--folder", folder, "--worker", str(out)]
        start = time.perf_counter()
        launch(command, 1)
        machine = f"{os.cpu_count()} cores"
        if a.device != "cpu":
            machine = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {machine}"
        print(f"{machine}; {platform.platform()}; torch {torch.__version__}", end="")
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if a.device != "cpu" else "-"  # type: ignore[no-untyped-call]
        print(f", NCCL {nccl}; checkpoint written in {time.perf_counter() - start:.0f} s", flush=True)
        for ranks in a.ranks:
            start = time.perf_counter()
            launch(command, ranks)
            runs.append({**json.loads(out.read_text()), "seconds": time.perf_counter() - start})
            if a.json is not None:
                write_whole(a.json, json.dumps(runs).encode())
            report(runs[0], runs[-1], open_checkpoint(Path(folder) / "model").geometry)


if __name__ == "__main__":
    main()
