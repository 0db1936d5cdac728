"""`mmquant calibrate` names the demo's overflowing experts and refuses bad input in one line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from helpers.calibration_cases import corpus, model, options
from helpers.paths import PACKAGE
from mmquant.calibration.statistics import live as live_module
from mmquant.calibration.statistics.live import LivePass
from mmquant.calibration.statistics.report import domain_balance, findings, summarise, table
from mmquant.commands.cli import cli
from mmquant.convert.gguf.imatrix import read_imatrix
from mmquant.convert.open import open_native


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["calibrate", *arguments])
    message = str(result.exception) if result.exception is not None else ""
    if isinstance(result.exception, SystemExit):
        message = result.stderr.strip().splitlines()[-1]
    return result.exit_code, result.stdout, message


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("demo")
    arguments = ("--model", "demo", "--out", str(folder / "out"), "--windows", "5", "--imatrix", str(folder / "i.gguf"))
    code, out, message = call(*arguments, "--json")
    assert code == 0, message
    return folder, json.loads(out)


def test_experts_3_and_11_of_the_last_layer_are_named(demo: tuple[Path, dict]) -> None:
    folder, found = demo
    assert [layer["overflow"] for layer in found["layers"]] == [[], [], [], [3, 11]]
    assert len(found["findings"]) >= 1
    page = (folder / "out" / "report.html").read_text()
    assert "layer 3: the down input of experts 3 and 11 overflows float16" in page
    assert found["layers"][3]["sum32"] > 65504
    assert found["layers"][3]["overflow_channels"] > 0
    assert found["corpus"]["windows_by_domain"].keys() >= {"chat", "code", "docs", "prose", "zh"}
    imatrix = read_imatrix(folder / "i.gguf")
    assert (imatrix.chunk_count, imatrix.chunk_size) == (5, 512)


def test_dead_experts_and_those_with_few_tokens_are_told(tmp_path: Path) -> None:
    path = model(tmp_path)
    live = LivePass(open_native(path), corpus(), options())
    found = live.layer(0)
    assert found.weights.router_bias is not None
    found.weights.router_bias[3] = -100.0
    from mmquant.calibration.statistics.layer_pass import calibrate_layer

    live.stream.start(0)
    statistics = calibrate_layer(live.stream, found.weights, live.corpus.domain, 2, options().collect, live.plan)
    summary = summarise(statistics)
    assert summary.dead == [3]
    assert summary.error_in[3] is None
    assert summary.few  # 84 tokens for 5 experts of 64 channels
    text = " ".join(findings([summary]))
    assert "expert 3 saw no token; the layer's pooled moments stand in" in text
    assert "fewer tokens than they have input channels" in text
    assert "0.." in "\n".join(table([summary]))


def test_domain_balance_counts_effective_experts() -> None:
    class Fake:
        load = ((8, 8, 8, 8), (32, 0, 0, 0))

    even, lone = domain_balance([Fake()], ("even", "lone"))  # type: ignore[list-item]
    assert even[1] == lone[1] == 32
    assert math.isclose(even[2], 4.0)
    assert math.isclose(lone[2], 1.0)


def test_a_dry_run_states_bytes_and_writes_nothing(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a short text for one window " * 20)
    small = ("--text", str(text), "--evaluation", __file__, "--context", "16")
    code, out, _ = call("--model", "demo", "--out", str(tmp_path / "s"), "--dry-run", "--memory", "6MB", *small)
    assert code == 0
    assert "full moments in float32: 18,2" in out
    assert "in 2 passes, finished ones in a temporary file" in out
    code, out, _ = call("--model", "demo", "--out", str(tmp_path / "s"), "--dry-run", "--json", *small)
    plan = json.loads(out)
    assert (plan["bytes"]["layers"], plan["bytes"]["passes"], plan["corpus"]["context"]) == (4, 1, 16)
    assert not (tmp_path / "s").exists()


def test_bad_input_is_one_line_with_its_exit_code(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    copied = PACKAGE / "data" / "text" / "evaluation" / "prose.txt"
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "robot", "content": "x"}]}\n')
    other = tmp_path / "other.txt"
    other.write_text("something else " * 99)
    out = ("--model", "demo", "--out", str(tmp_path / "out"))
    for arguments, reason in (
        (("--text", str(empty)), "empty.txt: empty, expected text"),
        (("--text", str(copied)), "prose.txt: overlaps the calibration text"),
        (("--text", str(chats)), "chats.jsonl: line 1: message 1 has role 'robot'"),
        (("--text", str(tmp_path / "none.txt")), "none.txt: no such file or folder"),
        (("--context", "4096"), "--context 4096: the model has at most 2048"),
        (("--imatrix", "i.dat"), "--imatrix i.dat: expected a name ending in .gguf"),
        (("--imatrix", "/proc/none/i.gguf"), "expected a place that can be written"),
        (("--memory", "1KB"), "0.01 GiB are left for moments"),
        (("--layers", "2:4"), "expected 0:B"),
    ):
        held = () if copied.name in reason else ("--evaluation", str(other))
        code, _, message = call(*out, "--windows", "2", *held, *arguments)
        assert code != 0, arguments
        assert reason in message, message
        assert "\n" not in message
    assert not (tmp_path / "out").exists()
    file = tmp_path / "file"
    file.write_text("x")
    text = tmp_path / "text.txt"
    text.write_text("a short text for one window " * 20)
    small = ("--text", str(text), "--evaluation", str(other), "--context", "16")
    code, _, message = call("--model", "demo", "--out", str(file), *small)
    assert code != 0
    assert "file: a file, expected a folder or nothing" in message


def test_a_second_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    for name in ("text", "other"):
        (tmp_path / f"{name}.txt").write_text(f"{name} of the calibration, again and again. " * 80)
    out = tmp_path / "out"
    arguments = ("--model", "demo", "--out", str(out), "--context", "32", "--evaluation", str(tmp_path / "other.txt"))
    arguments += ("--text", str(tmp_path / "text.txt"), "--windows")
    code, first, message = call(*arguments, "4")
    assert code == 0, message
    before = (out / "statistics.json").read_bytes()
    code, _, message = call(*arguments, "5")
    assert code != 0
    assert "holds statistics of another run: --windows 4, now 5; choose another folder or start over" in message
    assert (out / "statistics.json").read_bytes() == before
    code, text, _ = call(*arguments, "4")
    assert (code, text) == (0, first)


def test_activations_that_are_not_finite_stop_the_run_and_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    path = model(tmp_path)
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        name = "model.layers.1.block_sparse_moe.experts.2.w1.weight_scale_inv"
        if name in tensors:
            tensors[name] = torch.full_like(tensors[name], 1e30)
            tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight_scale_inv"] = torch.full((1, 1), 1e30)
            save_file(tensors, file)
    where, at = r"layer 1, expert 2, token \d+ of window (\d+): the input of down holds NaN", 1
    for share in (range(1, len(corpus().tokens)), None):  # a rank's, then that of a rank with the named window alone
        monkeypatch.setattr(live_module, "rank_share", lambda *_, own=share or range(at, at + 1): own)
        live = LivePass(open_native(path), corpus(), options())
        live.layer(0)
        with pytest.raises(ValueError, match=where) as error:
            live.layer(1)
        named = re.search(where, str(error.value))
        assert named is not None
        assert int(named[1]) == at or (share and int(named[1]) > at)
        at = int(named[1])
