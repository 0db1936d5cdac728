"""The memory that a dry run states is what a pass takes, and attention in blocks holds no window's scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from helpers.allocations import Allocations
from helpers.m27 import M27
from helpers.tiny import write_tiny
from mmquant.calibration.evaluate.memory import batch_bytes, memory_of
from mmquant.calibration.model import attention
from mmquant.calibration.model.forward import MASS, layer_forward
from mmquant.commands.cli import cli
from mmquant.convert.open import open_native
from mmquant.convert.source import read_layer
from mmquant.errors import InputError


@pytest.mark.parametrize(("windows", "context", "blocks"), [(1, 1500, True), (1, 1500, False), (6, 90, False)])
def test_activations_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: int, context: int, blocks: bool
) -> None:
    monkeypatch.setattr(attention, "SCORE_BYTES", 1 << 20)
    monkeypatch.setattr(attention.in_blocks, "__defaults__", (None, 1 << 20))
    monkeypatch.setattr(attention.block_of, "__defaults__", (1 << 20,))
    source = open_native(write_tiny(tmp_path))
    weights, g = read_layer(source, 0), source.geometry
    hidden = torch.randn(windows, context, g.hidden)
    rounding = {MASS: torch.clone} if blocks else {}
    with torch.inference_mode(), Allocations() as counted:
        layer_forward(weights, g, hidden, None, rounding)
    stated = batch_bytes(g, windows, context, torch.float32, "cpu", blocks)
    assert 0.7 * counted.peak <= stated <= 1.6 * counted.peak, (counted.peak, stated)
    if blocks:
        assert counted.peak < 4 * windows * g.heads * context**2  # one matrix of scores would be more than all of it


def test_long_windows_of_the_release() -> None:
    """64K tokens of M2.7 on one GPU of 80 GB, and twice as many windows on two ranks."""
    g = M27
    how = {"dtype": torch.bfloat16, "device": "cpu", "tokens": 8192, "changed": False}
    one = memory_of(g, 1, 65536, 2, **how)
    assert one.hidden == 2 * 4 * 65536 * 3072
    assert one.layer + one.batch < 40e9
    assert memory_of(g, 2, 65536, 2, ranks=2, **how).peak == one.peak
    changed = memory_of(g, 1, 65536, 2, **{**how, "changed": True, "dtype": torch.float32})
    assert changed.layer > 3.9 * one.layer


def test_a_dry_run_and_what_is_too_long(tmp_path: Path) -> None:
    line = [
        "eval",
        "demo",
        "--reference",
        "demo",
        "--engine-like",
        "vllm-h100",
        "--floor",
        "--windows",
        "3",
        "--dry-run",
    ]
    done = CliRunner().invoke(cli, [*line, "--json"])
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert (found["dry_run"], found["windows"], found["context"], found["positions"]) == (True, 3, 512, 3 * 511)
    assert len(found["models"]) == 6
    assert found["position_ranges"] == [[0, 128], [128, 512]]
    assert found["bytes"]["hidden"] == 6 * 4 * 3 * 512 * 256
    assert "activations of a batch" in CliRunner().invoke(cli, line).stdout
    too_long = CliRunner().invoke(cli, [*line, "--context", "2049"])
    assert isinstance(too_long.exception, InputError)
    assert "a context of 2049, the model has at most 2048" in str(too_long.exception)
