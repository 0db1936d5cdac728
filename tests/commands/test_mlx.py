"""`mmquant mlx`: options, calibrated folders in mlx_lm, equal logits, a written text, resumed runs, plans, recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from helpers.killed import check_continued
from helpers.tiny import few, write_code, write_tokenized
from mmquant.calibration.model.forward import embed, final_logits, layer_forward
from mmquant.commands.cli import cli
from mmquant.convert import manifest
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.fitting.catalog import find_rows
from mmquant.convert.folder.check import check_folder
from mmquant.convert.folder.doctor import examine_folder
from mmquant.convert.folder.kinds import plan_row
from mmquant.convert.folder.unit_bytes import fixed_bytes, unit_specs
from mmquant.convert.hub.card import Place, front_matter, published
from mmquant.convert.hub.card_text import generated
from mmquant.convert.open import open_native, open_source
from mmquant.convert.plan_file import PlanFile
from mmquant.convert.source import read_globals, read_layer
from mmquant.errors import InputError
from mmquant.runs.folder_steps import prepare
from mmquant.runs.journal import read_log
from mmquant.runs.mlx import mlx_variant
from mmquant.runs.options import MlxOptions

BAD = [
    (["--mode", "mxfp4", "--bits", "3"], "its bits and groups are fixed"),
    (["--mode", "nvfp4", "--attention", "mlx"], "mlx_lm has it for experts alone"),
    (["--mode", "mxfp4", "--size", "8MB"], "with a plan: expected affine"),
    (["--method", "rtn", "--effort", "high"], "rounding to nearest is not refined, expected gptq"),
    (["--method", "rtn", "--statistics", "x"], "round to nearest uses no statistics"),
    (["--bits", "3", "--plan", "x"], "--bits has no effect"),
    (["--plan", "nowhere.json"], "nowhere.json"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_one_line_for_bad_input(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, ["mlx", "--model", "demo", "--out", str(tmp_path / "o"), *arguments])
    assert isinstance(result.exception, (InputError, ValueError)), result.output
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not list(tmp_path.glob("o/*.safetensors"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenized(tmp_path_factory.mktemp("mlx") / "model", hidden_size=128, intermediate_size=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_code(tmp_path_factory.mktemp("text") / "text.txt")


def agrees(folder: Path) -> float:
    """Largest KL divergence of mlx_lm's next-token distributions, in float32, from those of our forward."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed (extra mlx)")
    import numpy as np
    from mlx_lm.utils import load_model

    source, tokens = open_source(folder), torch.arange(100, 164).unsqueeze(0)
    outside = read_globals(source)
    hidden = embed(outside, tokens)
    for layer in range(source.geometry.layers):
        hidden = layer_forward(read_layer(source, layer), source.geometry, hidden)
    ours = torch.log_softmax(final_logits(outside, source.geometry, hidden), -1)
    loaded, _ = load_model(folder)
    loaded.set_dtype(mx.float32)
    theirs = torch.log_softmax(torch.from_numpy(np.array(loaded(mx.array(tokens.numpy())))), -1)
    return float((ours.exp() * (ours - theirs)).sum(-1).max())


KINDS = [
    (["--bits", "3", "--group-size", "32"], "MLX-3bit-g32-gptq"),
    pytest.param(
        ["--bits", "2", "--effort", "high", "--attention", "bf16"], "MLX-2bit-g64-gptq-high", marks=pytest.mark.slow
    ),
    (["--mode", "mxfp4", "--attention", "mlx", "--embeddings", "bf16"], "MLX-MXFP4-g32-gptq"),
]


@pytest.mark.parametrize(("arguments", "label"), KINDS)
def test_calibrated_folders_run_in_mlx_lm(
    tmp_path: Path, model: Path, text: Path, arguments: list[str], label: str
) -> None:
    out = tmp_path / "o"
    result = CliRunner().invoke(cli, ["mlx", *few(model, text), *arguments, "--out", str(out)])
    assert result.exception is None, result.output
    found = open_source(out)
    assert isinstance(found, QuantizedFolder)
    assert check_folder(out, open_native(model)) == 2 * (4 + 3 * 4 + 1) + 2
    assert examine_folder(found) == []
    written = manifest.read(out)
    assert written is not None
    assert (written["artifacts"][0]["quant_label"], written["artifacts"][0]["format"]) == (label, "mlx")
    verdicts = {t["id"]: (t["engine"], t["fits"]) for t in written["targets"]}
    assert verdicts["128GB-unified"] == ("mlx_lm", "yes")
    assert verdicts["2xA100-80GB"][1] == "no"
    assert agrees(out) < 1e-5


def test_a_text_is_written(tmp_path: Path) -> None:
    """The demo model at four bits goes on as code does, in the engine itself."""
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra mlx)")
    words = ["mlx", "--model", "demo", "--method", "rtn", "--group-size", "128", "--out", str(tmp_path / "o")]
    assert CliRunner().invoke(cli, words).exception is None
    loaded, tokenizer = mlx_lm.load(str(tmp_path / "o"))
    said = mlx_lm.generate(loaded, tokenizer, "def add(a, b):\n    ", max_tokens=8)
    assert len(said) > 4
    assert said.isprintable() or "\n" in said


def test_a_killed_run_continues_with_equal_bytes(tmp_path: Path, model: Path, text: Path) -> None:
    check_continued(tmp_path, "mlx", *few(model, text), "--bits", "3", "--device", "cpu")


def test_a_plan_gives_every_module_its_width(tmp_path: Path, model: Path, text: Path) -> None:
    source, row = open_native(model), plan_row("mlx")
    groups = row.groups(source.geometry)
    words = {name: ("mlx-2-g64", "mlx-3-g32", "mlx-6-g64")[number % 3] for number, name in enumerate(groups)}
    size = fixed_bytes(source, row, headers=False)
    for name, word in words.items():
        chosen = next(kind for kind in groups[name] if kind.word == word)
        size += sum(n * sum(s.bytes for s in specs) for n, specs in unit_specs(source, row, name, chosen))
    made = PlanFile("mlx", source.fingerprint, source.label, {}, size, 3.0, 0.1, words)
    (tmp_path / "plan.json").write_text(json.dumps(made.to_dict()))
    out = tmp_path / "o"
    arguments = ["mlx", *few(model, text), "--plan", str(tmp_path / "plan.json"), "--out", str(out)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exception is None, result.output
    found = open_source(out)
    assert isinstance(found, QuantizedFolder)
    scheme = found.matrices["model.layers.1.block_sparse_moe.experts.3.w1"].scheme
    chosen = next(kind for kind in groups["layers.1.gate"] if kind.word == words["layers.1.gate"])
    assert scheme is not None
    assert (scheme.bits, scheme.group) == (chosen.bits, chosen.group)
    assert found.bytes == size
    assert agrees(out) < 1e-5
    said = json.loads((out / "mmquant.fit.json").read_text())["artifacts"][0]["provenance"]["run"]["plan"]
    assert set(said) == {"attention", "gate", "up", "down", "embeddings", "head"}


def test_a_recipe_makes_it(tmp_path: Path, model: Path, text: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    corpus = {"text": [str(text)], "text_only": True, "windows": 1, "context": 2}  # some experts see nothing
    variants = {"mac": {"command": "mlx", "method": "rtn", "bits": 3}, "solved": {"command": "mlx", "bits": 3}}
    recipe.write_text(json.dumps({"model": str(model), "corpora": {"main": corpus}, "variants": variants}))
    result = CliRunner().invoke(cli, ["run", str(recipe), "--out", str(tmp_path / "o")])
    assert result.exception is None, result.output
    steps = [event for event in read_log(tmp_path / "o") if event["event"] == "artifact" and event["name"] == "solved"]
    assert all({"solve", "encode"} <= set(event["stages"]) for event in steps[1:-1])
    assert any(event.get("unseen") for event in steps)
    written = manifest.read(tmp_path / "o/mac")
    assert written is not None
    assert front_matter({}, written, [], {})["library_name"] == "mlx"
    card = generated(written, "hf", "me/m27-mlx", "")
    assert "`mlx_lm.server --model me/m27-mlx`" in card
    assert "vllm serve" not in card
    mac = next(t for t in published(written, Place("ms", "me/m27-mlx"), {})["targets"] if t["id"] == "128GB-unified")
    assert mac["launch"]["argv"][:3] == ["mlx_lm.server", "--model", "me/m27-mlx"]
    assert mac["launch"]["env"] == {"MLXLM_USE_MODELSCOPE": "True"}


def test_fits_rows_are_the_bytes_that_are_written() -> None:
    source = open_native("demo")
    for row in find_rows("mlx"):
        given = dict(zip(row.command[1::2], row.command[2::2], strict=True))
        values = {flag[2:].replace("-", "_"): int(v) if v.isdigit() else v for flag, v in given.items()}
        variant = mlx_variant(source, MlxOptions(method="rtn", **values), Path("never"))  # type: ignore[arg-type]
        assert prepare(source, variant).bytes == row.weigh(source.geometry).total, row.id
