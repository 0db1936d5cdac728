"""`mmquant plan` for INT4, NVFP4 and MXFP4 folders: measured, chosen, written, read back by compressed-tensors."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from helpers import ct_reader
from helpers.killed import killed_at
from helpers.m27 import M27
from helpers.tiny import write_tiny
from mmquant import (
    InputError,
    Int4Options,
    MlxOptions,
    Mxfp4Options,
    Nvfp4Options,
    PlanOptions,
    plan,
    quantize_int4,
    quantize_mlx,
    quantize_mxfp4,
    quantize_nvfp4,
)
from mmquant.commands.awq import command as awq_command
from mmquant.commands.int4 import command as int4_command
from mmquant.convert.fitting.budgets import folder_budget, unified_budget
from mmquant.convert.fitting.memory import FREE
from mmquant.convert.fitting.placement import place_mlx, place_vllm
from mmquant.convert.fitting.targets import read_targets
from mmquant.convert.fitting.weights import Weights
from mmquant.convert.folder import unit_bytes
from mmquant.convert.folder.check import check_folder
from mmquant.convert.folder.kinds import plan_row, stored_bits
from mmquant.convert.open import demo_folder, open_native, open_source
from mmquant.convert.plan_file import PlanFile, read_plan_file
from mmquant.errors import FitError
from mmquant.runs.plan import SENSITIVITY
from mmquant.runs.plan_plot import draw

QUANTIZE = {"int4": (quantize_int4, Int4Options), "nvfp4": (quantize_nvfp4, Nvfp4Options)}
QUANTIZE |= {"mxfp4": (quantize_mxfp4, Mxfp4Options)}  # type: ignore[dict-item]
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_local_experts": 4}


def tiny(folder: Path, **changes: Any) -> Path:
    write_tiny(folder / "model", **{**SHAPE, "num_hidden_layers": 3, "vocab_size": 2048, **changes})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, folder / "model" / name)
    words = random.Random(1)
    for name in ("text", "other"):
        lines = (" ".join(chr(97 + words.randrange(26)) * words.randrange(1, 5) for _ in range(9)) for _ in range(80))
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("plan"))


def options(model: Path, kind: Any = PlanOptions, **changes: Any) -> Any:
    text, other = (str(model.parent / f"{name}.txt") for name in ("text", "other"))
    shared = {"text": (text,), "evaluation": (other,), "text_only": True, "windows": 8, "context": 32}
    return kind(**{**shared, "judged_windows": 2, **changes})


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plan of every format. INT4 and MXFP4 are measured; NVFP4 is said to cost what MXFP4 does."""
    found = {}
    for form in ("int4", "mxfp4", "nvfp4"):
        found[form] = tmp_path_factory.mktemp(form) / "plan"
        if form == "nvfp4":
            found[form].mkdir()
            known = (found["mxfp4"] / SENSITIVITY).read_text().replace("mxfp4", form)
            (found[form] / SENSITIVITY).write_text(known)
        done = plan(model, found[form], options(model, format=form, bits=9.0))
        assert "experts" in "\n".join(done.lines(explain=True))
        assert {row["tensor"] for row in done.rows()} >= {"layers.0.attention", "layers.2.experts"}
    return found


def changed(path: Path, out: Path, **tensors: str) -> Path:
    """A plan with other kinds, whose bytes are those kinds'."""
    document = json.loads(path.read_text())
    document["tensors"] |= {name.replace("_", "."): kind for name, kind in tensors.items()}
    out.write_text(json.dumps(document))
    return out


def shards_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


MIXTURES = {
    "int4": {"layers_0_experts": "int8-g128", "layers_1_experts": "fp8", "layers_2_experts": "int4-g32"}
    | {"layers_0_attention": "int8-g128", "layers_1_attention": "bf16", "layers_2_attention": "int4-g64"},
    "nvfp4": {"layers_0_experts": "nvfp4", "layers_1_experts": "bf16", "layers_2_experts": "fp8"}
    | {"layers_0_attention": "fp8", "layers_1_attention": "nvfp4", "layers_2_attention": "bf16"},
    "mxfp4": {"layers_0_experts": "fp8", "layers_1_experts": "mxfp4", "layers_2_experts": "mxfp4"}
    | {"layers_0_attention": "mxfp4", "layers_1_attention": "bf16", "layers_2_attention": "fp8"},
}


def mixture(model: Path, path: Path, form: str, out: Path) -> tuple[Path, PlanFile]:
    """The plan of MIXTURES, with the bytes that it has."""
    changed(path, out, **MIXTURES[form])
    run, kind = QUANTIZE[form]
    with pytest.raises(InputError, match="changed by hand") as error:
        run(model, out.parent / "none", options(model, kind, plan=out, method="rtn"), dry_run=True)
    document = json.loads(out.read_text())
    document["bytes"] = int(str(error.value).split("take ")[1].split(":")[0].replace(",", ""))
    out.write_text(json.dumps(document))
    return out, read_plan_file(out)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("form", list(QUANTIZE))
def test_every_mixture_is_read_alike_by_compressed_tensors(
    model: Path, made: dict[str, Path], tmp_path: Path, form: str, method: str
) -> None:
    path, chosen = mixture(model, made[form] / "plan.json", form, tmp_path / "plan.json")
    run, kind = QUANTIZE[form]
    more = {"kv_cache": "fp8"} if method == "gptq" else {}
    out = run(model, tmp_path / "out", options(model, kind, plan=path, windows=4, method=method, **more)).path
    source, ours, theirs = open_native(str(model)), open_source(out), ct_reader.dequantized(out)
    check_folder(out, source)
    extra = 8 * source.geometry.layers if more else 0
    assert sum(tensor.nbytes for tensor in ct_reader.tensors_of(out).values()) == chosen.bytes + extra
    row = plan_row(form)
    for layer in range(source.geometry.layers):
        for unit, name in (("experts", "block_sparse_moe.experts.3.w2"), ("attention", "self_attn.o_proj")):
            full = f"model.layers.{layer}.{name}.weight"
            bits = stored_bits(row, MIXTURES[form][f"layers_{layer}_{unit}"])
            found, original = theirs[full].float(), source.read(full)
            assert (found - ours.read(full)).abs().max() <= 0.01 * original.abs().max()
            error = float((found - original).norm() / original.norm())
            assert error < (0.005 if bits == 16 else 1e-6 if MIXTURES[form][f"layers_{layer}_{unit}"] == "fp8" else 0.2)


def test_the_budget_holds_and_more_of_it_costs_less(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    known = made["int4"] / SENSITIVITY
    whole = plan(model, tmp_path / "p", PlanOptions(format="int4", bits=16.0, sensitivity=known)).plan
    assert whole.kld < 1e-9, "the release is FP8 and carried exactly"
    klds = []
    for size in range(3_700_000, whole.bytes, 700_000):
        found = plan(model, tmp_path / "p", PlanOptions(format="int4", size=size, sensitivity=known))
        klds.append(found.plan.kld)
        out = quantize_int4(
            model, tmp_path / str(size), options(model, Int4Options, plan=found.path, method="rtn")
        ).path
        assert shards_of(out) <= size
        again = plan(model, tmp_path / "p", PlanOptions(format="int4", size=shards_of(out), sensitivity=known)).plan
        assert again.kld <= 1.05 * found.plan.kld + 1e-12, "what a plan takes is enough for it, or for its next kin"
    assert klds == sorted(klds, reverse=True)


def test_impossible_budgets_name_the_smallest_that_works(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    known = made["nvfp4"] / SENSITIVITY
    with pytest.raises(FitError, match="the smallest takes") as error:
        plan(model, tmp_path, PlanOptions(format="nvfp4", size=1000, sensitivity=known))
    least = int(str(error.value).split("takes ")[1].split(" ")[0].replace(",", ""))
    chosen = plan(model, tmp_path, PlanOptions(format="nvfp4", size=least, sensitivity=known))
    out = quantize_nvfp4(model, tmp_path / "o", options(model, Nvfp4Options, plan=chosen.path, method="rtn")).path
    assert shards_of(out) == least, "to the byte"
    with pytest.raises(FitError, match="the smallest takes"):
        plan(model, tmp_path, PlanOptions(format="nvfp4", size=least - 1, sensitivity=known))


def test_a_killed_measurement_goes_on_to_the_same_numbers(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    out, chosen = tmp_path / "out", options(model, format="mxfp4", bits=9.0)
    assert killed_at(out, 2, lambda: plan(model, out, chosen), r"rename .*sensitivity")
    assert not (out / SENSITIVITY).exists()
    plan(model, out, chosen)
    assert (out / SENSITIVITY).read_bytes() == (made["mxfp4"] / SENSITIVITY).read_bytes()
    assert {p.name for p in out.iterdir() if not p.name.startswith(".mmquant")} == {"plan.json", SENSITIVITY}


def test_one_command_plans_and_writes(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    chosen = options(model, Int4Options, size=6_000_000, sensitivity=made["int4"] / SENSITIVITY, method="rtn")
    first = quantize_int4(model, tmp_path / "out", chosen)
    assert first.label == "W4A16-planned-rtn"
    assert first.manifest()["artifacts"][0]["provenance"]["run"]["plan"]["experts"].startswith("0")
    assert quantize_int4(model, tmp_path / "out", chosen).path == first.path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "nvfp4"}, "a plan for mmquant nvfp4, expected one for int4"),
        ({"model": "0" * 64}, "planned for another model"),
        ({"tensors": {}}, "layers.0.attention is missing"),
        ({"layers.1.experts": "int4-g33"}, "layers.1.experts is int4-g33; .*int4-g32"),
        ({"layers.9.experts": "bf16"}, "layers.9.experts is no unit"),
        ({"bytes": 7}, "changed by hand"),
    ],
)
def test_damaged_plans_are_one_line(
    model: Path, made: dict[str, Path], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    document = json.loads((made["int4"] / "plan.json").read_text())
    inside = {name: value for name, value in changes.items() if name.startswith("layers.")}
    document |= {name: value for name, value in changes.items() if name not in inside}
    document["tensors"] = document["tensors"] | inside
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=says) as error:
        quantize_int4(model, tmp_path / "out", options(model, Int4Options, plan=tmp_path / "plan.json"))
    assert "\n" not in str(error.value)


def test_groups_that_devices_would_cut_are_not_planned(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    known = made["int4"] / SENSITIVITY
    four = plan(model, tmp_path / "4", PlanOptions(format="int4", bits=16.0, tp=4, sensitivity=known)).plan
    assert not {"fp8", "int8-g128", "int4-g128"} & set(four.tensors.values()), "256 / 4 = 64 inputs on a device"
    two = plan(model, tmp_path / "2", PlanOptions(format="int4", bits=9.0, sensitivity=known))
    assert "fp8" in two.plan.tensors.values()
    with pytest.raises(InputError, match="which 4 devices would cut; plan with --tp 4"):
        quantize_int4(model, tmp_path / "out", options(model, Int4Options, plan=two.path, tp=4))
    with pytest.raises(InputError, match="no group size divides"):
        plan(model, tmp_path / "3", PlanOptions(format="int4", bits=9.0, tp=3, sensitivity=known))


@pytest.mark.parametrize("target", ["2xA100-80GB", "8xH100-80GB", "2x24GB+96GB"])
def test_a_folder_of_the_budget_leaves_a_gibibyte_on_each_card(target: str) -> None:
    machine = read_targets()[target]
    for context in (8192, 32768):
        budget = folder_budget(M27, machine, context)
        found = place_vllm(Weights(budget, ()), M27, machine, context, "f16", 0)
        assert 0 <= found.margin - FREE <= 2


def test_the_scales_of_a_cache_are_counted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, row = open_native(model), plan_row("int4")
    monkeypatch.setattr(unit_bytes, "header_bytes", lambda source, specs: 0)
    weights = unit_bytes.fixed_bytes(source, row, headers=False)
    assert unit_bytes.fixed_bytes(source, row) - weights == 2 * 4 * source.geometry.layers  # of k and v, float32


def test_an_mlx_folder_of_the_budget_leaves_a_gibibyte() -> None:
    machine = read_targets()["128GB-unified"]
    found = place_mlx(Weights(unified_budget(M27, machine, 32768), ()), M27, machine, 32768, "f16")
    assert found.margin == FREE
    with pytest.raises(InputError, match="unified memory"):
        unified_budget(M27, read_targets()["24GB+96GB"], 8192)


def test_targets_without_cards_hold_no_folders(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    chosen = PlanOptions(
        format="int4", target="128GB-unified", target_context=512, sensitivity=made["int4"] / SENSITIVITY
    )
    with pytest.raises(InputError, match="vLLM needs cards"):
        plan(model, tmp_path, chosen)
    with pytest.raises(InputError, match="--target-context 513: the model has at most 512"):
        plan(model, tmp_path, dataclasses.replace(chosen, target="2xA100-80GB", target_context=513))
    found = plan(model, tmp_path, dataclasses.replace(chosen, target="2xA100-80GB"))
    assert found.plan.placement == {"tensor_parallel": 2}
    with pytest.raises(InputError, match="need CUDA"):
        plan(model, tmp_path, dataclasses.replace(chosen, target="2xMI300X-192GB"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sensitivity", "x"], "--sensitivity has no effect without --size or --target"),
        (["--size", "5MB", "--group-size", "32"], "--group-size has no effect with a plan"),
        (["--size", "5MB", "--eight-bit", "0"], "--eight-bit has no effect with a plan"),
        (["--size", "5MB", "--plan", "plan.json"], "expected one of them"),
        (["--size", "5MB", "--method", "awq"], "--method awq with a plan: expected"),
        (["--size", "5MB", "--format", "gptq"], "--format gptq with a plan: expected"),
        (["--size", "5MB", "--asymmetric"], "--asymmetric with a plan"),
        (["--plan", "missing.json", "--method", "rtn"], "missing.json: no such file"),
    ],
)
def test_words_that_contradict_each_other_are_refused(
    model: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        CliRunner().invoke(
            int4_command, ["--model", str(model), "--out", str(tmp_path / "out"), *arguments], catch_exceptions=False
        )
    assert "--plan" not in CliRunner().invoke(awq_command, ["--help"]).output


def test_a_bfloat16_release_pays_for_fp8(tmp_path: Path) -> None:
    plain = tiny(tmp_path, quantization_config=None, num_hidden_layers=1)
    done = plan(plain, tmp_path / "plan", options(plain, format="mxfp4", bits=16.0))
    found = json.loads(done.sensitivity.read_text())["groups"]["layers.0.experts"]["error"]
    assert 0 == found["bf16"] < found["fp8"] < found["mxfp4"]


def test_a_plan_is_drawn(made: dict[str, Path], tmp_path: Path) -> None:
    draw(read_plan_file(made["int4"] / "plan.json"), tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_text().count("experts") >= 1


def test_mlx_takes_widths_by_module(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmquant.convert.folder.kinds.MLX_BITS", (2, 8))
    monkeypatch.setattr("mmquant.convert.folder.kinds.MLX_GROUPS", (64,))
    done = plan(model, tmp_path / "plan", options(model, format="mlx", bits=6.0, windows=4, judged_windows=1))
    chosen = done.plan
    assert {"embeddings", "head", "layers.0.gate", "layers.2.attention"} <= set(chosen.tensors)
    assert {"mlx-2-g64", "mlx-8-g64"} == set(chosen.tensors.values())
    out = quantize_mlx(model, tmp_path / "out", MlxOptions(plan=done.path, method="rtn")).path
    assert sum(tensor.nbytes for tensor in ct_reader.tensors_of(out).values()) == chosen.bytes
    assert (
        sum(path.stat().st_size for path in out.glob("*.safetensors"))
        <= 6.0 * open_native(str(model)).geometry.parameters / 8
    )
    source, found = open_native(str(model)), open_source(out)
    for unit, name in (("up", "block_sparse_moe.experts.1.w3"), ("down", "block_sparse_moe.experts.1.w2")):
        full = f"model.layers.1.{name}.weight"
        error = float((found.read(full) - source.read(full)).norm() / source.read(full).norm())
        assert (error < 0.02) == (chosen.tensors[f"layers.1.{unit}"] == "mlx-8-g64")
