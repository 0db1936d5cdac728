"""What `--engine-like llama.cpp` predicts for a quantized cache is what the real llama.cpp gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers import llamacpp
from mmquant.commands.cli import cli

pytestmark = pytest.mark.peers

SMALL = ("--reference", "demo", "--windows", "8", "--context", "384", "--engine", "llama.cpp")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llamacpp.need()
    out = tmp_path_factory.mktemp("cache") / "bf16"
    assert CliRunner().invoke(cli, ["gguf", "--model", "demo", "--type", "BF16", "--out", str(out)]).exit_code == 0
    return next(out.glob("*.gguf"))


@pytest.mark.parametrize("cache", ["16bit", "q8_0", "q4_0"])
def test_a_cache_costs_what_is_predicted(gguf: Path, cache: str) -> None:
    line = ["eval", str(gguf), *SMALL, "--engine-like", "llama.cpp", "--cache", cache, "--json"]
    done = CliRunner().invoke(cli, line)
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    (predicted,) = found["candidates"][0]["engine_like"]
    (engine,) = found["engine_check"]["candidates"]
    assert found["engine_check"]["cache"] == cache
    theirs = engine["kld"]["mean"]
    assert abs(predicted["kld"]["mean"] - theirs) <= max(0.1 * theirs, 0.003)
    if cache == "q4_0":  # 0.086: the bound would not let another rounding through
        assert theirs > 0.05
    assert predicted["ppl"] == pytest.approx(engine["ppl"], rel=0.01)
