"""Bad input gets one line and the right exit code, and leaves no file under a final name."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.command import afresh, within
from helpers.entry import run
from helpers.tiny import write_tiny
from mmquant.convert.open import demo_folder
from mmquant.errors import FitError
from mmquant.runs.place import check_disk

COMMANDS = {
    "fp8": ["fp8"],
    "fp8 native": ["fp8", "--scheme", "native"],
    "int4": ["int4", "--method", "rtn", "--group-size", "32", "--tp", "1"],
    "gguf": ["gguf", "--type", "Q8_0"],
}
SECOND_SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with the demo's tokenizer (GGUF carries it inside)."""
    folder = write_tiny(tmp_path_factory.mktemp("whole") / "model", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def final_names(folder: Path) -> list[str]:
    """Files that a downstream program would take for finished."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp") and not p.name.startswith(".mmquant"))


def missing_shard(model: Path) -> None:
    (model / SECOND_SHARD).unlink()


def truncated_shard(model: Path) -> None:
    shard = model / SECOND_SHARD
    os.truncate(shard, shard.stat().st_size - 1)


def empty_shard(model: Path) -> None:
    (model / SECOND_SHARD).write_bytes(b"")


def flip(model: Path, offset: int) -> None:
    data = bytearray((model / SECOND_SHARD).read_bytes())
    data[offset] ^= 0x20
    (model / SECOND_SHARD).write_bytes(bytes(data))


def flipped_length(model: Path) -> None:
    flip(model, 1)


def flipped_dtype(model: Path) -> None:
    data = (model / SECOND_SHARD).read_bytes()
    flip(model, data.index(b'"dtype":"') + len(b'"dtype":"'))


def flipped_name(model: Path) -> None:
    data = (model / SECOND_SHARD).read_bytes()
    flip(model, data.index(b'"model.layers.') + 3)


def flipped_offset(model: Path) -> None:
    data = (model / SECOND_SHARD).read_bytes()
    flip(model, data.index(b'"data_offsets":[') + len(b'"data_offsets":['))


def endless_header(model: Path) -> None:
    data = (model / SECOND_SHARD).read_bytes()
    (model / SECOND_SHARD).write_bytes(struct.pack("<Q", 1 << 60) + data[8:])


def change(model: Path, ending: str, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(model / SECOND_SHARD)
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name] = value(tensors[name])
    save_file(tensors, model / SECOND_SHARD)


def nan_scale(model: Path) -> None:
    change(model, "weight_scale_inv", lambda t: torch.full_like(t, float("nan")))


def zero_scale(model: Path) -> None:
    change(model, "weight_scale_inv", torch.zeros_like)


def wrong_dtype(model: Path) -> None:
    change(model, "w2.weight", lambda t: t.to(torch.bfloat16))


def wrong_shape(model: Path) -> None:
    change(model, "w2.weight", lambda t: t[:-1].contiguous())


def configure(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def unknown_architecture(model: Path) -> None:
    configure(model, architectures=["LlamaForCausalLM"], model_type="llama")


def more_experts_than_stored(model: Path) -> None:
    configure(model, num_local_experts=6)


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def config_is_not_json(model: Path) -> None:
    (model / "config.json").write_text("{")


def index_escapes_the_folder(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    path.write_text(path.read_text().replace(SECOND_SHARD, "../" + SECOND_SHARD))


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (missing_shard, SECOND_SHARD),
    (truncated_shard, "truncated"),
    (empty_shard, SECOND_SHARD),
    (flipped_length, SECOND_SHARD),
    (flipped_dtype, "dtype"),
    (flipped_name, "missing"),
    (flipped_offset, SECOND_SHARD),
    (endless_header, SECOND_SHARD),
    (nan_scale, "nan"),
    (zero_scale, "expected finite and positive"),
    (wrong_dtype, "is stored as BF16"),
    (wrong_shape, "shape"),
    (unknown_architecture, "LlamaForCausalLM"),
    (more_experts_than_stored, "missing"),
    (no_config, "config.json"),
    (config_is_not_json, "config.json"),
    (index_escapes_the_folder, "expected a file name"),
]


def names_once(errors: str, folder: Path) -> None:
    """The line begins with the folder, so that it says which of several is meant, and names it once."""
    assert re.match(rf"mmquant: {re.escape(str(folder))}(: |/| )", errors), errors
    assert errors.count(str(folder)) == 1, errors


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault, mentioned", FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_damaged_checkpoint(
    command: str,
    fault: Callable[[Path], None],
    mentioned: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault(model)
    out = tmp_path / "out"
    code, shown, errors = run(monkeypatch, capsys, *COMMANDS[command], "--model", str(model), "--out", str(out))
    assert (code, shown) == (2, ""), errors
    assert errors.startswith("mmquant: ")
    assert errors.count("\n") == 1, errors
    assert mentioned in errors
    names_once(errors, model)
    assert not out.exists(), "nothing is written before the whole checkpoint is checked"


@pytest.mark.parametrize("fault, mentioned", FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_inspect_says_the_same(
    fault: Callable[[Path], None],
    mentioned: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault(model)
    code, shown, errors = run(monkeypatch, capsys, "inspect", str(model))
    assert (code, shown, errors.count("\n")) == (2, "", 1), errors
    assert mentioned in errors
    names_once(errors, model)


def candidate_is_cut(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)


def candidate_of_odd_groups(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"group_size": 32', '"group_size": "x"'))


def candidate_without_heads(folder: Path) -> None:
    configure(folder, num_attention_heads=0)


def candidate_with_infinite_scales(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("w2.weight_scale"))
    tensors[name] = torch.full_like(tensors[name], float("inf"))
    save_file(tensors, shard)


CANDIDATES = [candidate_is_cut, candidate_of_odd_groups, candidate_without_heads, candidate_with_infinite_scales]


@pytest.mark.parametrize("fault", CANDIDATES)
def test_eval_says_which_of_several_is_damaged(
    fault: Callable[[Path], None],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sound, damaged = tmp_path / "a", tmp_path / "b"
    assert run(monkeypatch, capsys, *COMMANDS["int4"], "--model", str(whole), "--out", str(sound))[0] == 0
    shutil.copytree(sound, damaged)
    fault(damaged)
    words = ["--reference", str(whole), "--windows", "1", "--context", "16"]
    code, shown, errors = run(monkeypatch, capsys, "eval", str(sound), str(damaged), *words)
    assert (code, shown) == (2, ""), errors
    names_once(errors.splitlines()[-1], damaged)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_output_is_a_file(
    command: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    code, _, errors = run(monkeypatch, capsys, *COMMANDS[command], "--model", str(whole), "--out", str(out))
    assert (code, errors.count("\n")) == (2, 1), errors
    assert str(out) in errors
    assert out.read_text() == "mine"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_output_holds_something_else(
    command: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    code, _, errors = run(monkeypatch, capsys, *COMMANDS[command], "--model", str(whole), "--out", str(out))
    assert (code, errors.count("\n")) == (2, 1), errors
    assert "thesis.txt" in errors
    assert final_names(out) == ["thesis.txt"]


@pytest.mark.parametrize(
    "arguments, mentioned",
    [
        (["gguf", "--type", "Q9_Z"], "Q9_Z"),
        (["fp8", "--scheme", "tensor"], "tensor"),
        (["int4", "--method", "rtn", "--group-size", "48"], "48"),
        (["int4", "--method", "rtn", "--group-size", "128"], "group size 128 does not divide"),
        (["fp8", "--device", "abacus"], "abacus"),
        (["fp8", "--max-shard-size", "five"], "five"),
        (["fp8", "--wrong-flag"], "--wrong-flag"),
        (["fp16"], "fp16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments(
    arguments: list[str],
    mentioned: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    code, shown, errors = run(monkeypatch, capsys, *arguments, "--model", str(whole), "--out", str(out))
    assert (code, shown, errors.count("\n")) == (2, "", 1), errors
    assert mentioned in errors
    assert not out.exists()


def test_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, out = tmp_path / "nowhere", tmp_path / "out"
    code, _, errors = run(monkeypatch, capsys, "fp8", "--model", str(missing), "--out", str(out))
    assert (code, errors.count("\n")) == (2, 1), errors
    assert "nowhere" in errors


def limited(arguments: list[str], file_bytes: int | None) -> subprocess.CompletedProcess[str]:
    """The real process; a file that grows past `file_bytes` fails, as on a disk (EFBIG takes ENOSPC's place)."""
    return afresh(within, file_bytes, arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_disk_runs_full(command: str, whole: Path, tmp_path: Path) -> None:
    """One line, exit 5, no file that looks finished; with room again the same command continues to the same bytes."""
    out, clean = tmp_path / "out", tmp_path / "clean"
    arguments = [*COMMANDS[command], "--model", str(whole), "--out"]
    assert limited([*arguments, str(clean)], None).returncode == 0  # compiled kernels are files too
    full = limited([*arguments, str(out)], file_bytes=150_000)
    assert full.returncode == 5, full.stderr
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("mmquant: ")]
    assert line.startswith(f"mmquant: {tmp_path}{os.sep}"), "which file"
    assert re.search(": File too large( while writing step [0-9]+)?, expected room for more; then run the same", line)
    assert ".tmp" not in line
    assert "Traceback" not in full.stderr
    assert "mmquant.fit.json" not in final_names(out)
    for name in final_names(out):
        assert (out / name).stat().st_size < 150_000, f"{name} was cut at the limit"
    assert limited([*arguments, str(out)], None).returncode == 0
    assert final_names(out) == final_names(clean)
    for name in final_names(clean):
        if name != "mmquant.fit.json":  # holds a date
            assert (out / name).read_bytes() == (clean / name).read_bytes(), name


def test_the_disk_is_too_small_from_the_start(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="bytes are needed, the disk has"):
        check_disk(tmp_path, 1 << 60)
