"""`mmquant gguf` on the demo model; a real llama.cpp loads what it writes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from helpers import llamacpp
from helpers.command import mmquant
from helpers.killed import command_killed_at
from mmquant.calibration.model.forward import embed, final_logits, layer_forward
from mmquant.calibration.text.tokenizer import windows
from mmquant.commands.gguf import command
from mmquant.convert import manifest
from mmquant.convert.open import demo_folder, open_source
from mmquant.convert.source import read_globals, read_layer

JOURNAL = r"rename \.mmquant-progress"  # how far the run is: after the start, the embeddings and each layer


def convert(out: Path, *options: str) -> Result:
    result = CliRunner().invoke(command, ["--model", "demo", "--out", str(out), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def sample(count: int, context: int) -> torch.Tensor:
    """Windows of text that the demo model can read: Python source."""
    import argparse
    import ast

    text = "".join(Path(str(module.__file__)).read_text() for module in (argparse, ast))
    tokenizer = open_source("demo").small_file("tokenizer.json")
    assert tokenizer is not None
    return windows(text, load_tokenizer(tokenizer), context, count)


def load_tokenizer(raw: bytes):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    return Tokenizer.from_str(raw.decode())


def reference_logits(tokens: torch.Tensor) -> np.ndarray:
    source = open_source("demo")
    outside = read_globals(source)
    hidden = embed(outside, tokens)
    for layer in range(source.geometry.layers):
        hidden = layer_forward(read_layer(source, layer), source.geometry, hidden)
    return final_logits(outside, source.geometry, hidden).numpy()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return sample(4, 192)


@pytest.fixture(scope="module")
def reference(tokens: torch.Tensor) -> np.ndarray:
    return reference_logits(tokens)


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    p, q = llamacpp.log_probabilities(reference), llamacpp.log_probabilities(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_llamacpp_computes_the_references_logits(tmp_path: Path, tokens: torch.Tensor, reference: np.ndarray) -> None:
    llamacpp.need()
    convert(tmp_path, "--type", "F32")
    found = llamacpp.logits(tmp_path / "demo-F32.gguf", tokens.tolist(), 192, exact=True)
    assert np.abs(found - reference).max() < 1e-2


def test_bf16_and_tokenizer(tmp_path: Path, tokens: torch.Tensor, reference: np.ndarray) -> None:
    llamacpp.need()
    convert(tmp_path, "--type", "bf16")
    path = tmp_path / "demo-BF16.gguf"
    found = llamacpp.logits(path, tokens.tolist(), 192)
    assert divergence(reference, found) < 2e-3
    assert (found.argmax(-1) == reference.argmax(-1)).mean() > 0.98
    text = "def f(x):\n\treturn 'it\\'s' * 1234567  # \u4e2d\u6587 \u00e9\u00e0 ]~b]user\n"
    raw = (demo_folder() / "tokenizer.json").read_bytes()
    assert llamacpp.tokens(path, text) == load_tokenizer(raw).encode(text).ids


@pytest.mark.parametrize("kind, limit", [("Q8_0", 0.005), ("Q6_K", 0.02), ("Q4_K", 0.08)])
def test_plain_types_stay_close(
    tmp_path: Path, tokens: torch.Tensor, reference: np.ndarray, kind: str, limit: float
) -> None:
    llamacpp.need()
    result = convert(tmp_path, "--type", kind, "--no-calibration")
    found = llamacpp.logits(Path(result.stdout.strip()), tokens.tolist(), 192)
    assert divergence(reference, found) < limit


def write_text(folder: Path) -> Path:
    import ast

    path = folder / "calibration.py"
    path.write_text(Path(str(ast.__file__)).read_text())
    return path


def test_calibrated_file_is_continued_and_closer(tmp_path: Path, tokens: torch.Tensor, reference: np.ndarray) -> None:
    llamacpp.need()
    options = ["--type", "Q2_K", "--name", "m"]
    text = ["--text", str(write_text(tmp_path)), "--text-only", "--windows", "6", "--context", "256"]
    convert(tmp_path / "plain", *options, "--no-calibration")
    convert(tmp_path / "whole", *options, *text)
    command_killed_at(
        tmp_path / "cut", JOURNAL, 5, "gguf", "--model", "demo", "--out", tmp_path / "cut", *options, *text
    )
    assert not (tmp_path / "cut" / "mmquant.fit.json").exists()
    convert(tmp_path / "cut", *options, *text)
    assert (tmp_path / "cut" / "m.gguf").read_bytes() == (tmp_path / "whole" / "m.gguf").read_bytes()
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {"m.gguf", "LICENSE", "FIT.md", "mmquant.fit.json"}
    plain, ours = (
        divergence(reference, llamacpp.logits(tmp_path / name / "m.gguf", tokens.tolist(), 192))
        for name in ("plain", "cut")
    )
    assert ours < plain


def test_parts_load_and_are_listed(tmp_path: Path, tokens: torch.Tensor) -> None:
    llamacpp.need()
    convert(tmp_path / "one", "--type", "Q8_0", "--name", "m")
    convert(tmp_path / "parts", "--type", "Q8_0", "--name", "m", "--max-part-size", "4MB")
    names = sorted(p.name for p in (tmp_path / "parts").glob("*.gguf"))
    assert len(names) == 5
    assert all((tmp_path / "parts" / name).stat().st_size <= 4_000_000 for name in names)
    whole = llamacpp.logits(tmp_path / "one" / "m.gguf", tokens.tolist()[:1], 192)
    split = llamacpp.logits(tmp_path / "parts" / names[0], tokens.tolist()[:1], 192)
    assert np.array_equal(whole, split)
    found = manifest.read(tmp_path / "parts")
    assert found is not None
    assert found["artifacts"][0]["entry"] == names[0]
    assert {f["path"] for f in found["artifacts"][0]["files"]} >= set(names)


def test_a_killed_run_continues_at_its_layer_with_the_same_bytes(tmp_path: Path) -> None:
    options = ["--type", "Q8_0", "--name", "m"]
    convert(tmp_path / "whole", *options)
    command_killed_at(tmp_path / "cut", JOURNAL, 5, "gguf", "--model", "demo", "--out", tmp_path / "cut", *options)
    assert not (tmp_path / "cut" / "mmquant.fit.json").exists()
    convert(tmp_path / "cut", *options)
    assert (tmp_path / "cut" / "m.gguf").read_bytes() == (tmp_path / "whole" / "m.gguf").read_bytes()
    assert not list((tmp_path / "cut").glob("*.tmp"))
    before = (tmp_path / "cut" / "m.gguf").stat().st_mtime_ns
    convert(tmp_path / "cut", *options)  # finished: recognised, left alone
    assert (tmp_path / "cut" / "m.gguf").stat().st_mtime_ns == before


def test_overrides_reach_the_file(tmp_path: Path) -> None:
    convert(tmp_path, "--type", "Q8_0", "--tensor-type", r"blk\.2\.ffn_down=bf16", "--tensor-type", "attn_q=Q6_K")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "demo-Q8_0.gguf").tensors}
    assert kinds["blk.2.ffn_down_exps.weight"] == "BF16"
    assert kinds["blk.1.ffn_down_exps.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q6_K"


def test_a_plan_decides_types(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"tensors": {"blk.2.ffn_down_exps.weight": "Q6_K", "output.weight": "BF16"}}')
    convert(tmp_path / "out", "--type", "Q8_0", "--plan", str(plan))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "demo-Q8_0.gguf").tensors}
    assert kinds["blk.2.ffn_down_exps.weight"] == "Q6_K"
    assert kinds["output.weight"] == "BF16"
    assert kinds["blk.1.ffn_down_exps.weight"] == "Q8_0"
    plan.write_text("[1]")
    done = CliRunner().invoke(command, ["--model", "demo", "--out", str(tmp_path / "x"), "--plan", str(plan)])
    assert "plan.json: JSON [1], expected an object" in str(done.exception)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--type", "Q9_K"), "--type Q9_K: unknown"),
        (("--tensor-type", "nothing=Q4_K"), "no tensor that can be quantized"),
        (("--name", "../x"), "--name '../x': expected a plain file name"),
        (("--name", ""), "--name '': expected a plain file name"),
        (("--tensor-type", "x"), "--tensor-type x: expected REGEX=TYPE"),
        (("--type", "Q8_0", "--max-part-size", "1KB"), "do not fit a part of 1000 bytes"),
    ],
)
def test_bad_options_leave_nothing(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    arguments = ["gguf", "--model", "demo", "--out", str(tmp_path / "out"), *options]
    done = mmquant(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_dry_run(tmp_path: Path) -> None:
    result = convert(tmp_path / "out", "--type", "Q8_0", "--dry-run")
    assert "15,463," in result.stdout
    assert not (tmp_path / "out").exists()
