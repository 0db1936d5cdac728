"""What fits has a command and a context, what does not has neither; group sizes say where they load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from helpers.m27 import M27
from mmquant.commands.cli import cli
from mmquant.convert.fitting.manifest import target_blocks
from mmquant.convert.fitting.requires import notes, parallel_allowed, requires
from mmquant.convert.fitting.targets import read_targets
from mmquant.convert.fitting.weights import Weights
from mmquant.convert.folder.weights import check_groups
from mmquant.convert.models.geometry import Geometry
from mmquant.errors import InputError


@pytest.fixture(scope="module")
def m27() -> Geometry:
    return M27


@pytest.mark.parametrize("format", ["gguf", "compressed-tensors"])
@pytest.mark.parametrize("size", [10**9, 60 * 10**9, 130 * 10**9, 143 * 10**9, 230 * 10**9])
def test_what_does_not_fit_has_no_command_and_no_context(format: str, size: int) -> None:
    layer = size * 97 // 100 // 62
    found = target_blocks("x", format, "x.gguf", Weights(size - 62 * layer, (layer,) * 62), M27, {"command": "int4"})
    assert [target["id"] for target in found] == list(read_targets())
    for target in found:
        if target["fits"] == "no":
            assert (target["context_tokens"], target["launch"], target["alternatives"]) == (0, {"argv": []}, [])
            assert target["missing"] or target["reason"]
        else:
            assert 256 <= target["context_tokens"] <= M27.max_context
            assert str(target["context_tokens"]) in target["launch"]["argv"]
            assert all(row["margin"] >= 0 for row in target["budget"])


def test_an_fp8_cache_is_budgeted_as_one() -> None:
    def first(**run: object) -> dict[str, Any]:
        weights = Weights(9 * 10**9, (18 * 10**8,) * 62)
        found = target_blocks("x", "compressed-tensors", ".", weights, M27, {"command": "int4", **run})
        return next(target for target in found if target["id"] == "2xA100-80GB")

    half, eight = first(), first(kv_cache="fp8")
    assert (half["kv_cache_type"], eight["kv_cache_type"]) == ("f16", "fp8")
    per_token = {t["kv_cache_type"]: t["budget"][0]["kv"] / t["context_tokens"] for t in (half, eight)}
    assert per_token["f16"] == 2 * per_token["fp8"]
    assert "--kv-cache-dtype" not in eight["launch"]["argv"]  # vLLM takes it by itself


def test_groups_name_the_parallelism_that_loads(m27: Geometry) -> None:
    assert parallel_allowed(m27, 128) == [1, 2, 4]
    assert parallel_allowed(m27, 64) == [1, 2, 4, 8]
    assert parallel_allowed(m27, -1) == [1, 2, 4, 8]
    assert requires({"command": "fp8", "scheme": "block"}, m27)["tensor_parallel_allowed"] == [1, 2, 4]
    assert "tensor_parallel_allowed" not in requires({"command": "fp8", "scheme": "channel"}, m27)
    assert not notes({"command": "int4", "group_size": 128}, m27)
    assert "vLLM 0.26 does not load" in notes({"command": "int4", "group_size": -1}, m27)[0]


def test_int4_attention_has_groups_too(m27: Geometry) -> None:
    check_groups(m27, 128, 2, "int4")
    odd = dataclasses.replace(m27, heads=8, head_dim=24)
    check_groups(odd, 64, 2, "bf16")
    with pytest.raises(InputError, match="group size 64 does not divide o's 192 inputs over 2 devices"):
        check_groups(odd, 64, 2, "int4")


def test_group_size_minus_one_is_noted_and_recorded(tmp_path: Path) -> None:
    line = ["int4", "--model", "demo", "--method", "rtn", "--group-size", "-1", "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(cli, line)
    assert done.exit_code == 0, done.output
    assert "vLLM 0.26 does not load INT4 experts" in done.stderr
    artifact = json.loads((tmp_path / "o" / "mmquant.fit.json").read_text())["artifacts"][0]
    assert artifact["requires"]["engines"] == {"vllm": ">=0.33"}


def test_types_that_cuda_sums_in_half_precision_are_known_bad_unless_calibrated(m27: Geometry) -> None:
    def bad(type: str, **more: object) -> bool:
        return "known_bad" in requires({"command": "gguf", "type": type, **more}, m27)

    assert [t for t in ("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q3_K_M", "Q2_K", "IQ4_XS", "Q6_K") if bad(t)] == [
        "Q4_K_S",
        "Q5_K_S",
        "Q3_K_M",
    ]
    assert not bad("Q4_K_S", calibration={})
