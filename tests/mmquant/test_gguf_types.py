"""Every type in the real llama.cpp: it loads, and its perplexity is the one that our streaming evaluation predicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import llamacpp
from mmquant.cmd_eval import command as eval_command
from mmquant.cmd_gguf import command as gguf_command
from mmquant.quantize.ggml.types import GGMLType

KINDS = [kind.name for kind in GGMLType if kind.name not in ("F32", "F16")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_as_predicted(tmp_path: Path, kind: str) -> None:
    llamacpp.need()
    experts = f"ffn_(gate|up|down)_exps={kind}"
    options = ["--model", "demo", "--type", "Q8_0", "--tensor-type", experts, "--no-calibration"]
    made = CliRunner().invoke(gguf_command, [*options, "--out", str(tmp_path)], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    path = made.stdout.strip()
    measure = ["--reference", path, "--windows", "12", "--context", "256", "--convention", "llama.cpp"]
    done = CliRunner().invoke(eval_command, [path, *measure, "--engine", "llama.cpp", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["engine_check"]["candidates"][0]["nonfinite"] == 0
    assert abs(result["engine_check"]["candidates"][0]["difference"]["ppl"]) < 0.01
