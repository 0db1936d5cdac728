"""`fit` from a model's name alone, from config.json, from finished artifacts; what it refuses and how."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import mmquant
from helpers.m27 import M27
from helpers.sparse_gguf import write_sparse
from mmquant import FitOptions, MlxOptions
from mmquant.commands.cli import cli
from mmquant.convert.fitting.commands import below
from mmquant.convert.fitting.targets import read_targets
from mmquant.convert.models.minimax_m2.release import M2_7
from mmquant.errors import InputError


def run(*line: str) -> Any:
    return CliRunner().invoke(cli, ["fit", *line])


def test_one_type_on_one_machine_has_complete_commands() -> None:
    found = mmquant.fit(options=FitOptions(type="IQ3_XXS", gpu="24GB", ram="96GB", context=32768))
    (one,) = found.to_dict()["fits"]
    assert (one["verdict"], one["placement"]["n_cpu_moe"], one["context"]) == ("yes", 53, 32768)
    argv = one["commands"][0]["argv"]
    file = "./MiniMax-M2.7-IQ3_XXS/MiniMax-M2.7-IQ3_XXS-00001-of-00002.gguf"
    assert argv[:5] == ["llama-server", "-m", file, "-c", "32768"]
    assert {"-np", "--jinja", "-fa", "--n-cpu-moe"} <= set(argv)
    assert shlex.join(one["made_by"]) == "mmquant gguf --type IQ3_XXS --out ./MiniMax-M2.7-IQ3_XXS"
    assert {c["engine"] for c in one["commands"]} == {"llama.cpp", "lm studio"}  # Ollama keeps no experts in RAM


def test_vllm_and_sglang_are_told_all_they_need() -> None:
    found = mmquant.fit(options=FitOptions(type="int4-g128", target="2xA100-80GB"))
    vllm, sglang = found.to_dict()["fits"][0]["commands"]
    for flag in ("--enable-auto-tool-choice", "--tool-call-parser", "--reasoning-parser", "--trust-remote-code"):
        assert flag in vllm["argv"]
    assert "--kv-cache-dtype" not in vllm["argv"]
    assert "--tool-call-parser" in sglang["argv"]
    asked = mmquant.fit(options=FitOptions(type="int4-g128", target="2xA100-80GB", kv_cache="fp8"))
    assert "--kv-cache-dtype" in asked.commands(asked.fits[0])[0].argv


def test_what_does_not_fit_has_no_command_and_no_context() -> None:
    found = mmquant.fit(options=FitOptions(type="fp8"))
    for one in found.to_dict()["fits"]:
        assert (one["verdict"] == "no") == (not one["commands"]) == (one["context"] == 0)


def test_a_card_alone_names_the_smallest_that_works() -> None:
    done = run("--target", "24GB")
    assert done.exception.exit_code == 5  # type: ignore[union-attr]
    assert "nothing fits there: the smallest, IQ1_S, needs 24GB+64GB" in str(done.exception)
    done = run("--target", "24GB+96GB", "--type", "Q6_K")
    assert "the largest type that fits there is Q3_K_M" in str(done.exception)


def test_a_mac_is_named_as_people_name_it() -> None:
    done = run("--target", "mac-128", "--type", "mlx-3-g128")
    assert "128GB-unified: 128 GiB unified memory" in done.output
    assert "fits: yes; context 98,304 tokens" in done.output


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--type", "Q4_KM"], "did you mean Q4_K_M"),
        (["--target", "24GB+98GB"], "did you mean 24GB+"),
        (["--context", "999999"], "expected 1 to 196608"),
        (["--gpu", "24GB", "--target", "24GB"], "choose one"),
        (["--gpu", "much"], "--gpu: 'much', expected a size"),
        (["nowhere.gguf"], "nowhere.gguf"),
        (["x", "--model", "demo"], "--model has no effect with ARTIFACT"),
    ],
)
def test_bad_input_is_one_line(line: list[str], said: str) -> None:
    done = run(*line)
    assert isinstance(done.exception, InputError), done.output
    assert said in str(done.exception)


def test_sizes_of_ram_differ() -> None:
    usable = []
    for ram in ("98GB", "98GiB", "98e9"):
        found = mmquant.fit(options=FitOptions(type="IQ2_M", gpu="24GB", ram=ram))
        usable.append(found.fits[0].target.ram)
    assert usable[0] == usable[2] < usable[1]


def test_any_config_json_is_fitted(tmp_path: Path) -> None:
    pruned = tmp_path / "config.json"
    pruned.write_text(json.dumps({**M2_7, "num_local_experts": 192}))
    whole = mmquant.fit(options=FitOptions(type="Q4_K_M", target="2xA100-80GB"))
    found = mmquant.fit(model=str(pruned), options=FitOptions(type="Q4_K_M", target="2xA100-80GB"))
    assert found.geometry.experts == 192
    assert found.fits[0].weights.experts * 4 == whole.fits[0].weights.experts * 3
    assert mmquant.fit(model=str(tmp_path), options=FitOptions(type="Q2_K", target="24GB+96GB")).rows()
    assert mmquant.fit(model="demo", options=FitOptions(type="Q8_0", target="24GB")).fits[0].context == 2048


def test_a_finished_file_is_fitted_by_its_header(tmp_path: Path) -> None:
    file = write_sparse(tmp_path, M27, "IQ3_XXS")
    found = mmquant.fit(file, FitOptions(target="24GB+96GB", context=32768))
    assert found.fits[0].placement.cpu_layers == 53
    assert str(file) in found.commands(found.fits[0])[0].argv


def test_a_finished_folder_with_scales_of_an_fp8_cache_is_fitted_as_one(tmp_path: Path) -> None:
    plain = mmquant.quantize_int4("demo", tmp_path / "o", mmquant.Int4Options(method="rtn", group_size=32))
    config = json.loads((plain.path / "config.json").read_text())
    assert mmquant.fit(plain.path, FitOptions(target="24GB")).fits[0].placement.cache == "f16"
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (plain.path / "config.json").write_text(json.dumps(config))
    found = mmquant.fit(plain.path, FitOptions(target="24GB"))
    assert (found.fits[0].placement.cache, found.fits[0].row.group) == ("fp8", 32)
    assert found.fits[0].weights.total == plain.bytes
    assert "--kv-cache-dtype" not in found.commands(found.fits[0])[0].argv


def test_tables_for_people() -> None:
    lines = run("--target", "24GB+96GB", "--type", "gguf").output.splitlines()
    assert any(line.startswith("Q3_K_M") and "--n-cpu-moe" in line for line in lines)
    lines = run("--type", "gguf").output.splitlines()
    assert any(line.startswith("Q4_K_M") and "24GB+128GB 32K" in line for line in lines)
    said = run("--type", "Q4_K_M").output
    assert all(any(line.startswith(f"{id} ") for line in said.splitlines()) for id in read_targets())
    assert max(len(line) for line in run().output.splitlines()[1:-1]) <= 80


def test_users_add_targets(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("targets:\n  - {id: attic, card: 48GB, count: 2, ram: 64GB}\n")
    done = run("--targets", str(own), "--target", "attic", "--type", "IQ2_M", "--json")
    assert json.loads(done.output)["fits"][0]["verdict"] == "yes"
    for text, said in [
        ("- 3", "expected `targets:`"),
        ("targets: [{id: a, card: 24GB}]", "ram is missing"),
        ("targets: [{id: a, rma: 64GB, ram: 8GB}]", "did you mean ram?"),
        ("targets: [{id: a, ram: 64GB, card: 24GB, count: 0}]", "count is 0"),
        ("targets: [", "not YAML"),
    ]:
        own.write_text(text)
        with pytest.raises(InputError, match=f"--targets .*{said.replace('?', '.')}"):
            read_targets(own)


@pytest.mark.parametrize("count", [1, 9, 10, 11, 19, 20, 53, 60, 62, 100, 101])
def test_the_regular_expression_of_layers(count: int) -> None:
    import re

    found = [n for n in range(120) if re.fullmatch(below(count), str(n))]
    assert found == list(range(count))


@pytest.mark.parametrize(
    ("type", "options"),
    [
        ("mlx-3-g128", {"bits": 3, "group_size": 128}),
        ("mlx-8-g32", {"bits": 8, "group_size": 32}),
        ("mlx-mxfp4", {"mode": "mxfp4"}),
        ("mlx-nvfp4", {"mode": "nvfp4"}),
    ],
)
def test_rows_of_mlx_are_what_its_command_writes(type: str, options: dict[str, Any], tmp_path: Path) -> None:
    found = mmquant.fit(options=FitOptions(type=type, target="128GB-unified"), model="demo").fits[0]
    made = mmquant.quantize_mlx("demo", tmp_path / "o", MlxOptions(method="rtn", **options), dry_run=True, device="cpu")
    assert found.weights.total == made.bytes
    words = [f"--{name.replace('_', '-')} {value}" for name, value in options.items()]
    assert " ".join(found.row.command) == " ".join(["mlx", *words])


def test_macs_alone_run_mlx() -> None:
    found = mmquant.fit(options=FitOptions(type="mlx"))
    bits = {row.row.id.split("-")[1] for row in found.fits}
    assert bits == {"2", "3", "4", "5", "6", "8", "mxfp4", "nvfp4"}
    for one in found.fits:
        engines = [command.engine for command in found.commands(one)]
        assert engines == (["mlx_lm"] if one.verdict != "no" else [])
        assert one.verdict == "no" or one.target.unified
    others = mmquant.fit(options=FitOptions(target="512GB-unified"))
    assert {c.engine for f in others.fits if f.row.family != "mlx" for c in others.commands(f)} & {"mlx_lm"} == set()
