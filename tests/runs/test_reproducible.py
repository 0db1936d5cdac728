"""The same bytes: two runs on one device; where nothing is calibrated, whatever the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.command import afresh, program
from helpers.tiny import write_tiny
from mmquant.convert.open import demo_folder

SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_local_experts": 3}
SHAPE |= {"num_attention_heads": 8, "vocab_size": 2048}
TEXT = ("--windows", "4", "--context", "32")
PLAIN = {"fp8": ("fp8", "--scheme", "channel"), "rtn": ("int4", "--method", "rtn"), "gguf": ("gguf", "--type", "Q8_0")}
CALIBRATED = {
    "gptq": ("int4", *TEXT),
    "high": ("int4", "--effort", "high", *TEXT),
    "gguf": ("gguf", "--type", "Q4_K_M", *TEXT),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("tiny"), **SHAPE)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((demo_folder() / name).read_bytes())
    (folder / "words.txt").write_text("def f(x):\n    return x + 1\n" * 60)
    return folder


def words(model: Path, out: Path, line: tuple[str, ...], device: str = "cpu") -> list[str]:
    text = ["--text", str(model / "words.txt"), "--text-only"] if "--windows" in line else []
    return [*line, *text, "--model", str(model), "--out", str(out), "--device", device]


def files(out: Path) -> dict[str, bytes]:
    """The artifact's tensor files."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".safetensors", ".gguf")}


def written(model: Path, out: Path, line: tuple[str, ...], device: str = "cpu") -> dict[str, bytes]:
    """What a new Python writes, whose strings have hashes of their own."""
    command = [sys.executable, "-m", "mmquant", *words(model, out, line, device)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return files(out)


def on_threads(threads: int, arguments: list[str]) -> None:
    """A command line on so many threads of torch and of the CPU kernels, which take as many."""
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    program(arguments)


def forked(model: Path, out: Path, line: tuple[str, ...], threads: int = 1) -> dict[str, bytes]:
    """What a process writes that need not load torch."""
    done = afresh(on_threads, threads, words(model, out, line))
    assert done.returncode == 0, done.stderr
    return files(out)


@pytest.mark.parametrize("name", PLAIN)
def test_without_calibration_threads_do_not_matter(model: Path, tmp_path: Path, name: str) -> None:
    one = forked(model, tmp_path / "one", PLAIN[name])
    assert one
    assert forked(model, tmp_path / "two", PLAIN[name], threads=2) == one


@pytest.mark.parametrize("name", ["gptq", "gguf", pytest.param("high", marks=pytest.mark.slow)])
def test_two_runs_give_the_same_bytes(model: Path, tmp_path: Path, name: str) -> None:
    one = forked(model, tmp_path / "one", CALIBRATED[name])
    assert one
    assert written(model, tmp_path / "two", CALIBRATED[name]) == one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("line", [*PLAIN.values(), *CALIBRATED.values()], ids=[*PLAIN, *CALIBRATED])
def test_two_runs_on_cuda_give_the_same_bytes(model: Path, tmp_path: Path, line: tuple[str, ...]) -> None:
    one = written(model, tmp_path / "one", line, "cuda")
    assert one
    assert written(model, tmp_path / "two", line, "cuda") == one
