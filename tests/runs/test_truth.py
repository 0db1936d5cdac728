"""NaN anywhere in a model stops every command by name; a failed run never looks finished."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from helpers.tiny import write_tiny
from mmquant.commands.cli import cli
from mmquant.convert.open import demo_folder
from mmquant.errors import InputError

SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_local_experts": 3}
SHAPE |= {"num_attention_heads": 8, "vocab_size": 2048}
HEAD = "lm_head.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.1."
TEXT = ("--windows", "2", "--context", "16")
COMMANDS = {
    "fp8": ("fp8",),
    "fp8 channel": ("fp8", "--scheme", "channel"),
    "fp8 native": ("fp8", "--scheme", "native"),
    "int4 rtn": ("int4", "--method", "rtn", "--attention", "fp8"),
    "int4 rtn awq": ("int4", "--method", "rtn", "--format", "awq", "--attention", "int4"),
    "int4 rtn gptq": ("int4", "--method", "rtn", "--format", "gptq", "--group-size", "32"),
    "int4 gptq": ("int4", *TEXT),
    "int4 high": ("int4", "--effort", "high", *TEXT),
    "awq": ("awq", *TEXT),
    "gguf Q8_0": ("gguf", "--type", "Q8_0"),
    "gguf BF16": ("gguf", "--type", "BF16"),
    "gguf Q2_K fast": ("gguf", "--type", "Q2_K", "--effort", "fast", *TEXT),
    "gguf Q4_K_M": ("gguf", "--type", "Q4_K_M", *TEXT),
    "calibrate": ("calibrate", *TEXT),
}
NEEDS_TEXT = [name for name, line in COMMANDS.items() if set(TEXT) <= set(line)]
WORDS = "def f(x):\n    return x + 1\n" * 40


def model(folder: Path) -> Path:
    write_tiny(folder, shards=1, **SHAPE)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_bytes((demo_folder() / name).read_bytes())
    (folder / "words.txt").write_text(WORDS)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("whole"))


def spoiled(whole: Path, folder: Path, name: str, value: float, place: tuple[int, ...]) -> Path:
    """The model with one value of one tensor replaced."""
    folder.mkdir()
    for path in whole.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    (shard,) = whole.glob("*.safetensors")
    tensors = load_file(shard)
    wide = tensors[name].float()
    wide[place] = value
    tensors[name] = wide.to(tensors[name].dtype)
    save_file(tensors, folder / shard.name)
    return folder


def refusal(*line: str) -> str:
    result = CliRunner().invoke(cli, list(line))
    assert isinstance(result.exception, InputError), (result.output, result.exception)
    return str(result.exception)


def line_of(command: str, folder: Path, out: Path) -> list[str]:
    """The command on a model, calibrated (where it is) on a few words."""
    text = ["--text", str(folder / "words.txt")] if command in NEEDS_TEXT else []
    text += ["--text-only"] if text and command != "calibrate" else []  # which reads nothing else
    return [*COMMANDS[command], *text, "--model", str(folder), "--out", str(out)]


def is_published(out: Path) -> bool:
    """Whether something in `out` says that it is finished."""
    layers = json.loads((out / "statistics.json").read_text())["layers"] if (out / "statistics.json").exists() else []
    return (out / "mmquant.fit.json").exists() or len(layers) == SHAPE["num_hidden_layers"]


PLACES = [
    (EXPERT + "w2.weight", math.nan, (3, 200)),
    ("model.layers.0.self_attn.k_proj.weight", math.nan, (0, 0)),
    ("model.layers.1.block_sparse_moe.gate.weight", math.inf, (2, 7)),
    (HEAD, -math.inf, (1, 244)),
    ("model.embed_tokens.weight", math.nan, (2047, 255)),
]


def cases() -> list[tuple[str, int]]:
    """Every place for commands without calibration; for the others, which take longer, two places in turn."""
    found = []
    for index, command in enumerate(COMMANDS):
        chosen = {0, 1 + index % (len(PLACES) - 1)} if command in NEEDS_TEXT else range(len(PLACES))
        found += [(command, place) for place in chosen if not (command == "calibrate" and PLACES[place][0] == HEAD)]
    return found


@pytest.mark.parametrize("command, case", cases())
def test_a_value_that_is_not_finite_is_named_and_nothing_is_finished(
    whole: Path, tmp_path: Path, command: str, case: int
) -> None:
    name, value, place = PLACES[case]
    bad, out = spoiled(whole, tmp_path / "bad", name, value, place), tmp_path / "out"
    said = refusal(*line_of(command, bad, out))
    assert f"{name} holds NaN or infinity, first at {list(place)}" in said
    assert not is_published(out)
    if command not in NEEDS_TEXT:
        assert refusal(*line_of(command, bad, out)) == said


@pytest.mark.parametrize("command", NEEDS_TEXT)
def test_activations_that_are_not_finite_stop_the_pass(whole: Path, tmp_path: Path, command: str) -> None:
    """Finite weights whose products are not."""
    bad = spoiled(whole, tmp_path / "bad", "model.layers.0.post_attention_layernorm.weight", 3e38, (0,))
    said = refusal(*line_of(command, bad, tmp_path / "out"))
    assert "layer 0" in said
    assert "NaN or infinity" in said
    assert not is_published(tmp_path / "out")


def test_a_reference_that_is_not_finite_measures_nothing(whole: Path, tmp_path: Path) -> None:
    bad = spoiled(whole, tmp_path / "bad", "model.layers.0.post_attention_layernorm.weight", 3e38, (0,))
    said = refusal("eval", str(whole), "--reference", str(bad), *TEXT, "--text", str(bad / "words.txt"))
    assert "hidden states after layer 0 hold NaN or infinity, first in window 0" in said


@pytest.mark.parametrize("command", ["fp8", "fp8 channel", "int4 rtn", "int4 rtn awq"])
def test_what_fails_its_check_stays_unfinished(whole: Path, tmp_path: Path, command: str) -> None:
    """An expert that is zero throughout can be written, but an engine would serve a hole."""
    folder, out = tmp_path / "bad", tmp_path / "out"
    spoiled(whole, folder, EXPERT + "w2.weight", 0.0, (slice(None), slice(None)))  # type: ignore[arg-type]
    line = [*COMMANDS[command], "--model", str(folder), "--out", str(out)]
    said = refusal(*line)
    assert f"{EXPERT}w2 is zero throughout" in said
    assert not is_published(out)
    assert refusal(*line) == said
    assert "expected a finished artifact" in refusal("push", str(out), "--repo", "me/x", "--dry-run")


def test_native_is_a_copy_of_fp8_alone(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", quantization_config=None)
    line = ["fp8", "--scheme", "native", "--model", str(plain), "--out", str(tmp_path / "out")]
    for more in ([], ["--dry-run"]):
        assert "its weights are not FP8" in refusal(*line, *more)
    assert not (tmp_path / "out").exists()


def test_native_of_a_release_whose_experts_are_not_fp8_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "half", shards=1)
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    for name in [n for n in tensors if ".experts." in n]:
        if name.endswith("_inv"):
            del tensors[name]
        else:
            tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, shard)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append("experts")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").unlink()
    said = refusal("fp8", "--scheme", "native", "--model", str(folder), "--out", str(tmp_path / "out"))
    assert "experts.0.w1 is BF16, expected FP8" in said
