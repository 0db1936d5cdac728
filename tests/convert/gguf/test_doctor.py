"""`mmquant doctor` finds faults put into real files and rescales the demo model's overflow exactly."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from helpers import llamacpp
from mmquant.calibration.gguf.maxima import Largest, largest_sums
from mmquant.calibration.text.chat import load_template
from mmquant.calibration.text.corpus import bundled, pack_windows, read_sets
from mmquant.calibration.text.tokenizer import load_tokenizer
from mmquant.calibration.text.tokenizer import windows as cut
from mmquant.commands.calibrate import command as calibrate_command
from mmquant.commands.doctor import command
from mmquant.commands.gguf import command as gguf_command
from mmquant.convert.gguf.doctor import AT_RISK, SCALES, exponents, plan_fix, scaled_blocks, summed
from mmquant.convert.gguf.reader import GgufSource
from mmquant.convert.open import open_source
from mmquant.errors import GateError
from mmquant.quantize.ggml.codec import decode, encode
from mmquant.quantize.ggml.types import GGMLType
from mmquant.quantize.overflow import FP16_MAX


@pytest.fixture(scope="module")
def risky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as Q4_0 with its last down projection in Q4_K, not rescaled, in several parts."""
    folder = tmp_path_factory.mktemp("risky")
    options = ["--model", "demo", "--out", str(folder), "--no-calibration", "--type", "Q4_0", "--name", "m"]
    options += ["--tensor-type", r"blk\.3\.ffn_down=Q4_K", "--max-part-size", "3MB"]
    result = CliRunner().invoke(gguf_command, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder


def windows() -> torch.Tensor:
    return cut(Path(str(ast.__file__)).read_text(), load_tokenizer(open_source("demo")), 256, 8)


def doctor(file: Path, *options: str) -> Result:
    return CliRunner().invoke(command, [str(file), *options])


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A text in which experts 3 and 11 of the last layer overflow."""
    text = tmp_path_factory.mktemp("text") / "text.py"
    text.write_text(Path(str(ast.__file__)).read_text())
    return ["--text", str(text), "--windows", "4"]


@pytest.fixture(scope="module")
def repaired(risky: Path, measure: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """`doctor --fix` of it: the new folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("repaired") / "m"
    done = doctor(risky, *measure, "--json", "--fix", "--out", str(folder))
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout)


def test_the_demo_overflows(risky: Path, measure: list[str]) -> None:
    found = doctor(risky, *measure, "--json")
    assert isinstance(found.exception, GateError)
    overflow = [f for f in json.loads(found.stdout)["findings"] if f["where"] == "blk.3.ffn_down_exps.weight"]
    assert overflow[0]["experts"] == [3, 11]
    assert overflow[0]["level"] == "error"


def test_a_fix_rescales_exactly_and_nothing_else(
    risky: Path, measure: list[str], repaired: tuple[Path, dict[str, Any]]
) -> None:
    folder, document = repaired
    assert {(c["layer"], c["expert"]) for c in document["rescaled"]} == {(3, 3), (3, 11)}
    before, after = GgufSource(risky), GgufSource(folder)
    for expert, power in ((c["expert"], c["power"]) for c in document["rescaled"]):
        for role, factor in (("w3", 2.0**-power), ("w2", 2.0**power)):
            name = f"model.layers.3.block_sparse_moe.experts.{expert}.{role}.weight"
            assert torch.equal(before.read(name) * factor, after.read(name))
    changed = sum((a.data != b.data).sum() for a, b in zip(before.files, after.files, strict=True))
    assert 0 < changed < 20_000  # block scales of four matrices, nothing else
    sums = largest_sums(after, windows(), "cpu", [32] * 4)
    assert float(sums.max()) < FP16_MAX / 2
    assert doctor(folder, *measure).exit_code == 0


def test_llamacpp_gives_the_same_logits(risky: Path, repaired: tuple[Path, dict[str, Any]]) -> None:
    llamacpp.need()
    tokens = windows()[:2].tolist()
    first = next(p.name for p in sorted(risky.glob("*.gguf")))
    before, after = (llamacpp.logits(folder / first, tokens, 256) for folder in (risky, repaired[0]))
    assert np.array_equal(before, after)  # and so is any perplexity


def test_a_real_nan_is_repaired(tmp_path: Path) -> None:
    """Q4_1 keeps sums of 32 in float16 in llama.cpp's CPU code as well: the overflow before and after rescaling."""
    llamacpp.need()
    options = ["--model", "demo", "--out", str(tmp_path / "m"), "--no-calibration", "--type", "Q8_0", "--name", "m"]
    CliRunner().invoke(gguf_command, [*options, "--tensor-type", r"blk\.3\.ffn_down_exps=Q4_1"], catch_exceptions=False)
    measure = ["--text", "default", "--windows", "4", "--fix", "--out", str(tmp_path / "fixed")]
    fixed = doctor(tmp_path / "m", *measure)
    assert fixed.exit_code == 0, fixed.output
    source = open_source("demo")
    text = read_sets([str(bundled("evaluation"))], load_template(source))
    tokens = pack_windows(text, load_tokenizer(source), 256, 3).tokens.tolist()
    before, after = (llamacpp.logits(tmp_path / name / "m.gguf", tokens, 256) for name in ("m", "fixed"))
    assert not np.isfinite(before).all()
    assert np.isfinite(after).all()


@pytest.mark.parametrize("kind", [k for k in GGMLType if k.name in (*SCALES, "F32", "F16", "BF16", "MXFP4")])
def test_scales_carry_the_power_exactly(kind: GGMLType) -> None:
    rows = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)) * 200
    data = encode(rows, kind).numpy()
    for power in (-3, 4):
        moved = scaled_blocks(data, kind, power, "x")
        before, after = (decode(torch.from_numpy(part), kind, 512) for part in (data, moved))
        assert torch.equal(before * 2.0**power, after)


def test_a_scale_below_float16_is_refused() -> None:
    data = encode(torch.randn(1, 256, generator=torch.Generator().manual_seed(0)) * 1e-3, GGMLType.Q6_K).numpy()
    with pytest.raises(ValueError, match="x: 1 block scales would leave float16's normal range"):
        scaled_blocks(data, GGMLType.Q6_K, -8, "x")
    with pytest.raises(ValueError, match="cannot be rescaled in place"):
        scaled_blocks(np.zeros((1, 56), np.uint8), GGMLType.IQ1_M, 1, "x")


def test_a_scale_may_rise_from_below_the_normal_range() -> None:
    """What is subnormal already and stays exact has not left the normal range; what is normal must remain so."""
    blocks = np.zeros((2, 1, 18), np.uint8)  # Q4_0: a scale, 16 bytes of codes
    blocks[0, 0, :2] = np.frombuffer(np.float16(2.0**-20).tobytes(), np.uint8)
    blocks[1, 0, :2] = np.frombuffer(np.float16(2.0**-13).tobytes(), np.uint8)
    raised = scaled_blocks(blocks[0], GGMLType.Q4_0, 4, "x")
    assert raised[0, :2].copy().view(np.float16) == np.float16(2.0**-16)
    with pytest.raises(ValueError, match="x: 1 block scales would leave"):
        scaled_blocks(blocks[1], GGMLType.Q4_0, -2, "x")  # exact, but no longer normal


def test_types_that_need_no_rescaling_never_stop_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q6_K sums in float32: its experts are rescaled where scales allow it, and left alone where not."""
    options = ["--model", "demo", "--out", str(tmp_path / "m"), "--no-calibration", "--type", "Q6_K", "--name", "m"]
    CliRunner().invoke(gguf_command, options, catch_exceptions=False)
    source = GgufSource(tmp_path / "m")
    patches, done, left = plan_fix(source, {(3, 3): 4, (3, 11): 12})
    assert (done, len(patches)) == ({(3, 3): 4}, 2)
    assert left[0].experts == (11,)
    assert "left alone, its type needs no rescaling" in left[0].text
    assert left[0].level == "warning"
    monkeypatch.setitem(AT_RISK, "Q6_K", 32)
    with pytest.raises(ValueError, match=r"expert 11: .* would leave float16's normal range"):
        plan_fix(source, {(3, 11): 12})


def test_maxima_of_statistics_decide(risky: Path, measure: list[str], tmp_path: Path) -> None:
    options = ["--model", "demo", *measure, "--moments", "diagonal", "--out", str(tmp_path / "s")]
    done = CliRunner().invoke(calibrate_command, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = doctor(risky, "--statistics", str(tmp_path / "s"), "--fix", "--out", str(tmp_path / "fixed"))
    assert found.exit_code == 0, found.output
    lines = [line.split() for line in found.stdout.splitlines()]
    head = next(i for i, words in enumerate(lines) if words[:2] == ["rescaled", "layer"])
    assert lines[head + 1][:2] == ["3", "3"]
    assert float(lines[head + 1][-1]) > 1  # times below 65504


def test_q2_k_is_measured_by_sums_of_16(tmp_path: Path) -> None:
    options = ["--model", "demo", "--out", str(tmp_path / "m"), "--no-calibration", "--type", "Q4_0", "--name", "m"]
    CliRunner().invoke(gguf_command, [*options, "--tensor-type", r"blk\.3\.ffn_down=Q2_K"], catch_exceptions=False)
    source = GgufSource(tmp_path / "m")
    assert [summed(source, layer) for layer in range(4)] == [32, 32, 32, 16]
    watch = [Largest(1, block) for block in (16, 32)]
    h = torch.cat((torch.full((1, 16), 3.0), torch.full((1, 16), -2.0)), 1)
    for each in watch:
        each.experts(h, h, h, torch.zeros(1), torch.zeros(1), [0, 1])
    assert [float(each.sums) for each in watch] == [48.0, 16.0]


def test_powers_are_the_smallest_with_the_margin() -> None:
    sums = torch.tensor([[1.0, 3e4, 65600.0, 3e5]])
    assert exponents(sums) == {(0, 2): 3, (0, 3): 5}


def test_dead_and_broken_experts_are_found(risky: Path, tmp_path: Path) -> None:
    for path in risky.glob("*.gguf"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    source = GgufSource(tmp_path)
    file, tensor = source.locate("blk.1.ffn_up_exps.weight")
    size = tensor.size // 16
    with open(file.path, "rb+") as handle:
        handle.seek(tensor.offset + 5 * size)
        handle.write(bytes(size))
        handle.seek(tensor.offset + 7 * size)
        handle.write(b"\x00\x7c")  # an infinite scale
        handle.seek(tensor.offset + 9 * size)
        handle.write(bytes(18))  # a block without anything
        handle.seek(tensor.offset + 2 * size)
        handle.write(np.float16(60000).tobytes())  # a scale that makes weights of thousands
    result = doctor(tmp_path)
    assert isinstance(result.exception, GateError)
    assert "blk.1.ffn_up_exps.weight: is all zero (experts 5)" in result.stdout
    assert "blk.1.ffn_up_exps.weight: holds NaN or infinity (experts 7)" in result.stdout
    assert "warning: blk.1.ffn_up_exps.weight: has blocks that are all zero (experts 9)" in result.stdout
    assert "warning: blk.1.ffn_up_exps.weight: holds absurd values (experts 2)" in result.stdout


def test_wrong_metadata_is_found(risky: Path, tmp_path: Path) -> None:
    for path in risky.glob("*.gguf"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = sorted(tmp_path.glob("*.gguf"))[0]
    data = first.read_bytes()
    key = b"tokenizer.ggml.pre\x08\0\0\0\x0a\0\0\0\0\0\0\0"
    assert key in data
    first.write_bytes(data.replace(key + b"minimax-m2", key + b"gpt-2-like"))
    result = doctor(tmp_path)
    assert "error: tokenizer.ggml.pre: 'gpt-2-like', expected 'minimax-m2'" in result.stdout


def test_fix_without_maxima_is_refused(risky: Path) -> None:
    result = doctor(risky, "--fix")
    assert "needs --statistics or --text" in str(result.exception)
