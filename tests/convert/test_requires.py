"""What fits has a command and a context, what does not has neither; group sizes say where they load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mmquant.commands.cli import cli
from mmquant.convert import fit
from mmquant.convert.fit import Weights
from mmquant.convert.folder.weights import check_groups
from mmquant.convert.models.geometry import Geometry
from mmquant.convert.open import open_native
from mmquant.convert.requires import notes, parallel_allowed, requires
from mmquant.errors import InputError


@pytest.fixture(scope="module")
def m27() -> Geometry:
    demo = open_native("demo").geometry
    sizes = {"layers": 62, "hidden": 3072, "heads": 48, "kv_heads": 8, "head_dim": 128, "experts": 256}
    return dataclasses.replace(demo, **sizes, expert_width=1536, vocab=200064, rotary_dim=64, max_context=196608)


@pytest.mark.parametrize("kind", ["gguf", "compressed-tensors"])
@pytest.mark.parametrize("size", [10**9, 60 * 10**9, 130 * 10**9, 140 * 10**9, 143 * 10**9, 230 * 10**9])
def test_what_does_not_fit_has_no_command_and_no_context(m27: Geometry, kind: str, size: int) -> None:
    layer = size * 97 // 100 // 62
    for target in fit.targets("x", kind, ".", Weights(size - 62 * layer, (layer,) * 62), m27):
        if target["fits"] == "no":
            assert (target["context_tokens"], target["launch"]) == (0, {"argv": []})
        else:
            assert 256 <= target["context_tokens"] <= m27.max_context
            assert str(target["context_tokens"]) in target["launch"]["argv"]
            assert all(row["margin"] >= 0 for row in target["budget"])


def test_an_fp8_cache_is_budgeted_as_one(m27: Geometry) -> None:
    def first(cache: str) -> dict[str, Any]:
        return fit.targets("x", "compressed-tensors", ".", Weights(9 * 10**9, (2 * 10**9,) * 62), m27, cache)[0]

    half, eight = first("f16"), first("fp8")
    assert (half["kv_cache_type"], eight["kv_cache_type"]) == ("f16", "fp8")
    per_token = {t["kv_cache_type"]: t["budget"][0]["kv"] / t["context_tokens"] for t in (half, eight)}
    assert per_token["f16"] == 2 * per_token["fp8"]


def test_groups_name_the_parallelism_that_loads(m27: Geometry) -> None:
    assert parallel_allowed(m27, 128) == [1, 2, 4]
    assert parallel_allowed(m27, 64) == [1, 2, 4, 8]
    assert parallel_allowed(m27, -1) == [1, 2, 4, 8]
    assert requires({"command": "fp8", "scheme": "block"}, m27) == {"tensor_parallel_allowed": [1, 2, 4]}
    assert not requires({"command": "fp8", "scheme": "channel"}, m27)
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
