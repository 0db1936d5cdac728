"""safetensors reads our folders, whole or continued to the same bytes; shards obey their limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmquant.convert.files.atomic import sha256_file, whole_file, write_whole
from mmquant.convert.files.lock import hold
from mmquant.convert.files.progress import PROGRESS, unfinished_run
from mmquant.convert.folder.writer import FolderWriter, plan_shards
from mmquant.convert.formats.spec import TensorSpec

RUN = {"command": "test"}
STEPS = [
    [TensorSpec("a", "BF16", (3, 5)), TensorSpec("b", "F32", (1,))],
    [TensorSpec("c", "F8_E4M3", (7, 11)), TensorSpec("d", "I64", (2,))],
    [TensorSpec("e", "I32", (4, 6)), TensorSpec("f", "BF16", (0, 4))],
]


def values(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64, "I32": torch.int32}
    dtypes["F8_E4M3"] = torch.float8_e4m3fn
    return {s.name: (torch.randn(s.shape, generator=generator) * 9).to(dtypes[s.dtype]) for s in STEPS[step]}


def write(folder: Path, limit: int, stop_after: int | None = None) -> FolderWriter | None:
    """Write all steps, or leave the writer as a killed process would after `stop_after` steps."""
    folder.mkdir(exist_ok=True)
    writer = FolderWriter(folder, STEPS, RUN, limit)
    for step in range(writer.done, len(STEPS)):
        if step == stop_after:
            writer.close()
            return None
        writer.write(step, values(step))
    writer.finish({"config.json": b"{}"})
    return writer


def test_a_hash_that_the_run_did_not_live_to_record_is_taken_from_the_file(tmp_path: Path) -> None:
    assert write(tmp_path, 60, stop_after=2) is None
    state = json.loads((tmp_path / PROGRESS).read_bytes())
    (tmp_path / PROGRESS).write_text(json.dumps(state | {"sha256": {}}))
    writer = write(tmp_path, 60)
    assert writer is not None
    assert {s.name: sha256_file(tmp_path / s.name) for s in writer.shards}.items() <= writer.sha256.items()


@pytest.mark.parametrize("limit", [1, 60, 150, 10_000])
def test_shards_hold_what_was_given(tmp_path: Path, limit: int) -> None:
    writer = write(tmp_path, limit)
    assert writer is not None
    found = {}
    for shard in writer.shards:
        path = tmp_path / shard.name
        assert path.stat().st_size == shard.bytes
        assert sha256_file(path) == writer.sha256[shard.name]
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    expected = {name: value for step in range(3) for name, value in values(step).items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].float(), value.float())
        assert found[name].dtype == value.dtype


@pytest.mark.parametrize("limit", [1, 60, 150, 10_000])
@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_stopped_run_continues_to_the_same_bytes(tmp_path: Path, limit: int, stop_after: int) -> None:
    whole = write(tmp_path / "whole", limit)
    assert whole is not None
    assert write(tmp_path / "cut", limit, stop_after) is None
    for path in (tmp_path / "cut").glob("*.tmp"):  # bytes of a step that was never recorded
        with open(path, "ab") as file:
            file.write(b"torn")
    assert unfinished_run(tmp_path / "cut") == RUN
    continued = write(tmp_path / "cut", limit)
    assert continued is not None
    assert continued.sha256 == whole.sha256


def test_limits_are_kept_and_one_large_tensor_stands_alone() -> None:
    shards = plan_shards([[TensorSpec(str(i), "I8", (size,)) for i, size in enumerate([5, 5, 5, 40, 1, 9])]], 10)
    assert [[t.bytes for t in s.tensors] for s in shards] == [[5, 5], [5], [40], [1, 9]]
    assert [s.name for s in shards][-1] == "model-00004-of-00004.safetensors"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_whole(path, b"old")
    (tmp_path / "y").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "y", b"new")  # a folder in its place
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"half" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


def test_the_second_process_is_refused_by_name(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(ValueError, match=r"in use by process \d+ on"), hold(tmp_path):
        pass
    with hold(tmp_path):
        pass
