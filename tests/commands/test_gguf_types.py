"""A real llama.cpp loads every type; its perplexity equals that of our streamed evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from click.testing import CliRunner

from helpers import llamacpp
from mmquant.commands.doctor import command as doctor_command
from mmquant.commands.eval import command as eval_command
from mmquant.commands.gguf import command as gguf_command
from mmquant.quantize.ggml.types import GGMLType

KINDS = [kind.name for kind in GGMLType if kind.name not in ("F32", "F16")]
OVERFLOW = ("Q4_1", "Q5_1")  # sums in float16 in llama.cpp's CPU code too: the demo gives NaN until it is rescaled


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_as_predicted(tmp_path: Path, kind: str) -> None:
    """All matrices of the file in the type, embeddings and head too; prose, code, docs, chat and Chinese."""
    llamacpp.need()
    options = ["--model", "demo", "--type", "Q8_0", "--tensor-type", f".*={kind}", "--no-calibration"]
    made = CliRunner().invoke(gguf_command, [*options, "--out", str(tmp_path)], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    path = made.stdout.strip()
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types == {"F32", kind}
    if kind in OVERFLOW:
        fix = [path, "--text", "default", "--windows", "16", "--fix", "--in-place"]
        assert CliRunner().invoke(doctor_command, fix, catch_exceptions=False).exit_code == 0
    measure = ["--reference", "demo", "--windows", "40", "--convention", "llama.cpp", "--engine", "llama.cpp", "--json"]
    done = CliRunner().invoke(eval_command, [path, *measure], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["engine_check"]["candidates"][0]
    assert found["nonfinite"] == 0
    assert abs(found["difference"]["ppl"]) < 0.01
