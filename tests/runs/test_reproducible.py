"""The same bytes: two runs on one device; where nothing is calibrated, whatever the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def written(model: Path, out: Path, line: tuple[str, ...], device: str = "cpu", threads: int = 1) -> dict[str, bytes]:
    """The artifact's tensor files."""
    text = ["--text", str(model / "words.txt")] if "--windows" in line else []
    command = [sys.executable, "-m", "mmquant", *line, *text, "--model", str(model), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, "--device", device], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".safetensors", ".gguf")}


@pytest.mark.parametrize("name", PLAIN)
def test_without_calibration_threads_do_not_matter(model: Path, tmp_path: Path, name: str) -> None:
    one = written(model, tmp_path / "one", PLAIN[name])
    assert one
    assert written(model, tmp_path / "two", PLAIN[name], threads=2) == one


@pytest.mark.parametrize("name", ["gptq", "gguf", pytest.param("high", marks=pytest.mark.slow)])
def test_two_runs_give_the_same_bytes(model: Path, tmp_path: Path, name: str) -> None:
    one = written(model, tmp_path / "one", CALIBRATED[name])
    assert one
    assert written(model, tmp_path / "two", CALIBRATED[name]) == one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("line", [*PLAIN.values(), *CALIBRATED.values()], ids=[*PLAIN, *CALIBRATED])
def test_two_runs_on_cuda_give_the_same_bytes(model: Path, tmp_path: Path, line: tuple[str, ...]) -> None:
    one = written(model, tmp_path / "one", line, "cuda")
    assert one
    assert written(model, tmp_path / "two", line, "cuda") == one
