"""docs/results.md is what the stored results say, and rivals are what they are called."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from helpers import ggml_lib
from helpers.paths import ROOT
from mmquant.commands.cli import cli
from mmquant.convert.models.shapes import expert_shape
from mmquant.convert.open import open_source
from mmquant.quantize.ggml.types import GGMLType


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    return importlib.import_module("results")


def test_the_page_is_that_of_the_stored_results(results: ModuleType) -> None:
    stored = [json.loads(path.read_text()) for path in sorted((ROOT / "docs" / "results").glob("*.json"))]
    assert stored
    assert (ROOT / "docs" / "results.md").read_text() == results.page(stored) + "\n"
    for found in stored:
        files = {row["file"] for row in found["rows"]}
        assert files <= set(results.ROWS)
        for row in found["rows"]:
            # exact and as engines compute it, side by side; no profile is of mlx_lm
            assert row["engine_like"] or row["file"].startswith("mlx"), row["file"]


def test_a_rival_has_our_bytes_and_the_other_rules_values(results: ModuleType, tmp_path: Path) -> None:
    for name, line in (("mxfp4", ("mxfp4", "--method", "rtn")), ("gguf", ("gguf", "--type", "Q8_0"))):
        done = CliRunner().invoke(cli, [*line, "--model", "demo", "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.exception
    truth = open_source("demo")
    ours = open_source(tmp_path / "mxfp4")
    rival = results.Rival(ours, truth, "by OCP's rule", None)
    args = (1, "up", range(2, 4), "cpu", torch.float32)
    assert rival.bytes == ours.bytes
    assert torch.equal(rival.read_experts(*args), ours.read_experts(*args))  # --method rtn is that rule
    by_maximum = results.Rival(ours, truth, "to nearest, largest / 7.5", None).read_experts(*args)
    steps = by_maximum.unflatten(-1, (-1, 128))
    codes = steps / (truth.read_experts(*args).unflatten(-1, (-1, 128)).abs().amax(-1, keepdim=True) / 7.5)
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    ggml_lib.need()
    file = open_source(next((tmp_path / "gguf").glob("*.gguf")))
    stock = results.Rival(file, truth, "ggml's encoder, imatrix", None)
    assert stock.ggml_type("blk.1.ffn_up_exps.weight") == "Q8_0"
    values = truth.read_experts(*args)
    shape = expert_shape(truth.geometry, "up")
    wanted = [ggml_lib.decode(ggml_lib.encode(matrix, GGMLType.Q8_0), GGMLType.Q8_0, shape[1]) for matrix in values]
    assert torch.equal(stock.read_experts(*args), torch.stack(wanted))
    query = truth.geometry.names.attention(0, "q_proj") + ".weight"
    found = ggml_lib.decode(ggml_lib.encode(truth.read(query), GGMLType.Q8_0), GGMLType.Q8_0, shape[1])
    assert torch.equal(stock.read(query), found)
