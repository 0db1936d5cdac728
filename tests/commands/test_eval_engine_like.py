"""`mmquant eval --engine-like`, by position, floors and claims: what the result says, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from mmquant.commands.cli import cli
from mmquant.errors import GateError, InputError
from mmquant.runs.evaluation.claims import make_claims
from mmquant.runs.evaluation.result import validate
from mmquant.runs.evaluation.table import table
from mmquant.runs.reports.evaluation import write_report

SMALL = ("--reference", "demo", "--windows", "2", "--context", "136")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["eval", *map(str, arguments), *SMALL])


def document(*arguments: str | Path) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    validate(found)
    return found


def refusal(*arguments: str | Path) -> str:
    error = run(*arguments).exception
    assert isinstance(error, InputError), error
    return str(error)


def made(folder: Path, *line: str) -> Path:
    done = CliRunner().invoke(cli, [*line, "--model", "demo", "--out", str(folder)])
    assert done.exit_code == 0, done.exception
    return folder


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("like") / "int4", "int4", "--method", "rtn")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(made(tmp_path_factory.mktemp("like") / "q8", "gguf", "--type", "Q8_0").glob("*.gguf"))


def changed(folder: Path, out: Path, config: Callable[[dict[str, Any]], None], **scales: float) -> Path:
    """A folder with other quantization_config, and with scales beside every matrix whose name ends so."""
    out.mkdir()
    tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("mmquant.fit.json", "model.safetensors.index.json"):
            shutil.copy(path, out)
    data = json.loads((out / "config.json").read_text())
    config(data["quantization_config"])
    (out / "config.json").write_text(json.dumps(data))
    stems = {name.rpartition(".")[0] for name in tensors}
    for ending, value in scales.items():
        module, _, suffix = ending.partition("__")
        tensors |= {f"{stem}.{suffix}": torch.tensor([value]) for stem in stems if stem.endswith(f".{module}")}
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.fixture(scope="module")
def whole(int4: Path, gguf: Path) -> dict[str, Any]:
    """The original, INT4 and Q8_0, exactly and as vLLM computes them."""
    return document("demo", int4, gguf, "--engine-like", "vllm-h100", "--engine-like", "vllm-a100")


def test_exact_and_engine_like_stand_side_by_side(whole: dict[str, Any], tmp_path: Path) -> None:
    found = whole
    fp8, weights_only, file = found["candidates"]
    assert [like["profile"] for like in fp8["engine_like"]] == ["vllm-h100", "vllm-a100"]
    assert file["engine_like"] == []  # vLLM opens no GGUF
    h100, a100 = fp8["engine_like"]
    assert h100["inputs"] == {"attention": "FP8 1x128", "experts": "FP8 1x128", "cache": "16bit"}
    assert a100["inputs"] == {"attention": "16 bit", "experts": "16 bit", "cache": "16bit"}
    assert fp8["kld"]["mean"] == 0
    assert 0.0002 < a100["kld"]["mean"] < 0.006 < h100["kld"]["mean"] < 0.06
    # weights only: both cards multiply with bfloat16 inputs
    first, second = (like["kld"]["mean"] for like in weights_only["engine_like"])
    assert first == second != weights_only["kld"]["mean"]
    write_report(tmp_path / "report.html", found)
    assert "demo (exact)" in table(found)
    assert "demo (vllm-h100)" in table(found)
    assert "demo (vllm-h100)" in (tmp_path / "report.html").read_text()


def test_a_cache_of_the_engine(tmp_path: Path, int4: Path, gguf: Path) -> None:
    """vLLM takes an FP8 cache by itself where the folder asks for it, with its scales; llama.cpp when asked to."""

    def ask(quantization: dict[str, Any]) -> None:
        quantization["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}

    kv = changed(int4, tmp_path / "kv", ask, k_proj__k_scale=0.125, v_proj__v_scale=2.0**-12)
    found = document(int4, kv, "--engine-like", "vllm-h100")
    plain, eight = (candidate["engine_like"][0] for candidate in found["candidates"])
    assert (plain["inputs"]["cache"], eight["inputs"]["cache"]) == ("16bit", "fp8")
    assert eight["kld"]["mean"] > plain["kld"]["mean"] * 1.05  # values above 448 * 2^-12 are cut off
    (off,) = document(kv, "--engine-like", "vllm-h100", "--cache", "16bit")["candidates"][0]["engine_like"]
    assert off["kld"] == plain["kld"]
    losses = [
        document(gguf, "--engine-like", "llama.cpp", "--cache", cache)["candidates"][0]["engine_like"][0]
        for cache in ("16bit", "q4_0")
    ]
    assert [loss["profile"] for loss in losses] == ["llama.cpp 16bit", "llama.cpp q4_0"]
    assert losses[1]["kld"]["mean"] > 3 * losses[0]["kld"]["mean"]


def test_fp4_inputs_cost_on_the_card_that_has_them(tmp_path: Path) -> None:
    def ask(quantization: dict[str, Any]) -> None:
        for group in quantization["config_groups"].values():
            group["input_activations"] = {"num_bits": 4, "type": "float"}

    weights_only = made(tmp_path / "w4a16", "nvfp4", "--method", "rtn")
    scales = dict.fromkeys(("w1__input_global_scale", "w2__input_global_scale", "w3__input_global_scale"), 100.0)
    folder = changed(weights_only, tmp_path / "w4a4", ask, **scales)
    found = document(folder, "--engine-like", "vllm-b200", "--engine-like", "vllm-h100")["candidates"][0]
    b200, h100 = found["engine_like"]
    assert (b200["inputs"]["experts"], b200["inputs"]["attention"]) == ("FP4", "16 bit")
    assert h100["inputs"]["experts"] == "16 bit"
    assert b200["kld"]["mean"] > 1.2 * h100["kld"]["mean"]
    missing = changed(weights_only, tmp_path / "none", ask)
    assert "has no scale of its FP4 inputs" in refusal(missing, "--engine-like", "vllm-b200")


def test_what_is_refused(int4: Path, gguf: Path, tmp_path: Path) -> None:
    mlx = made(tmp_path / "mlx", "mlx", "--method", "rtn")
    assert "opens none of the artifacts, expected a folder" in refusal(mlx, "--engine-like", "vllm-h100")
    assert "expected exact or one of vllm-h100" in refusal(int4, "--engine-like", "vllm-v100")
    assert "opens none of the artifacts, expected a folder" in refusal(gguf, "--engine-like", "vllm-h100")
    assert "--cache q4_0: vllm-h100 has none" in refusal(int4, "--engine-like", "vllm-h100", "--cache", "q4_0")
    assert "expected --engine or --engine-like beside it" in refusal(int4, "--cache", "fp8")
    assert "expected float32" in refusal(int4, "--engine-like", "vllm-h100", "--dtype", "bfloat16")
    assert "expected --activations exact" in refusal(int4, "--engine-like", "vllm-h100", "--convention", "llama.cpp")
    assert "expected one of several ARTIFACTs" in refusal(int4, "--better-than", int4)
    assert "expected one of several ARTIFACTs" in refusal(int4, int4, "--better-than", int4)


def test_by_position(whole: dict[str, Any]) -> None:
    candidate = whole["candidates"][1]
    first, last = candidate["positions"]
    found = [(block["from"], block["to"], block["tokens"]) for block in (first, last)]
    assert found == [(0, 128, 2 * 128), (128, 136, 2 * 7)]
    mean = (first["kld"] * first["tokens"] + last["kld"] * last["tokens"]) / candidate["tokens"]
    assert mean == pytest.approx(candidate["kld"]["mean"])
    layers = candidate["layers"]
    overlap = sum(layer["expert_overlap"] for layer in layers) / len(layers)
    assert (first["expert_overlap"] * 128 + last["expert_overlap"] * 8) / 136 == pytest.approx(overlap)


def test_claims_are_made_and_refused(whole: dict[str, Any], int4: Path, gguf: Path, tmp_path: Path) -> None:
    original, worse, better = whole["candidates"]
    claims = make_claims(whole, (str(int4),))
    assert [(claim["first"], claim["verdict"], claim["holds"]) for claim in claims] == [
        ("demo", "better", True),
        (str(gguf), "better", True),
    ]
    last = whole["comparisons"][-1]
    assert (last["first"], last["second"], last["verdict"]) == (str(int4), str(gguf), "worse")
    assert last["kld"]["difference"] == pytest.approx(worse["kld"]["mean"] - better["kld"]["mean"])
    stored = tmp_path / "others.json"
    stored.write_text(json.dumps({**whole, "candidates": [original, better]}))
    done = run(int4, "--better-than", stored)
    assert isinstance(done.exception, GateError)
    assert "not better than demo: worse" in str(done.exception)
    assert done.stdout.count("refused") == 2
    for change, words in (
        ({"sample": {**whole["sample"], "tokens_sha256": "0" * 64}}, "another tokens_sha256"),
        ({"reference": {**whole["reference"], "fingerprint": "x"}}, "another reference"),
        ({"candidates": [{"label": "x", "units": {"tokens": [1]}}]}, "not a result of eval --json"),
        ({"schema": "other"}, "schema 'other'"),
    ):
        stored.write_text(json.dumps({**whole, **change}))
        with pytest.raises(InputError, match=words):
            make_claims(whole, (str(stored),))


def test_what_differs_beyond_the_floor(int4: Path) -> None:
    found = document(int4, "demo", "--floor")
    kinds = [floor["kind"] for floor in found["floors"]]
    assert kinds == ["floor: bfloat16", "floor: order of sums, seed 1", "floor: order and size of batches, 1"]
    assert found["floor"]["kld"] == found["floors"][0]["kld"]
    lost, itself = ({row["number"]: row for row in c["beyond_floor"]} for c in found["candidates"])
    assert all(lost[name]["beyond"] for name in ("kld", "hidden state"))
    assert not any(row["beyond"] for row in itself.values())
    assert lost["kld"]["floor"] == max(floor["kld"]["mean"] for floor in found["floors"])
    assert "what differs beyond the noise floor" in table(found)
