"""gguf-py reads the written container; splits, resume after SIGKILL, memory."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import gguf
import numpy as np
import pytest

from helpers.killed import forked
from mmquant.convert.gguf.metadata import Value
from mmquant.convert.gguf.writer import GgufWriter, TensorInfo, plan_parts
from mmquant.errors import InputError

METADATA = {
    "general.architecture": Value("str", "minimax-m2"),
    "a.u32": Value("u32", 7),
    "a.f32": Value("f32", 0.5),
    "a.bool": Value("bool", True),
    "a.texts": Value("[str]", ["", "é", "x" * 300]),
    "a.numbers": Value("[i32]", [-1, 2**30]),
    "a.u64": Value("u64", 2**40),
}
TENSORS = (
    TensorInfo("embd", (5, 7), "F32"),
    TensorInfo("norm", (3,), "F32"),
    TensorInfo("blk.0.q", (2, 3, 256), "Q4_K"),
    TensorInfo("blk.0.k", (3, 32), "Q8_0"),
    TensorInfo("blk.1.q", (2, 3, 256), "IQ2_XXS"),
    TensorInfo("blk.1.k", (3, 5), "BF16"),
)


def content(tensor: TensorInfo) -> np.ndarray:
    seed = int(hashlib.sha256(tensor.name.encode()).hexdigest()[:8], 16)
    return np.random.default_rng(seed).integers(0, 60, tensor.bytes, np.uint8)  # no NaN in any type


def write(folder: Path, limit: int = 10**9, stop: int | None = None) -> list[Path]:
    writer = GgufWriter(folder, plan_parts("m", METADATA, TENSORS, limit))
    for tensor in TENSORS[writer.done : stop]:
        writer.write(tensor.name, content(tensor))
        writer.checkpoint()
    if stop is not None:
        writer.close()
        return []
    paths = writer.finish()
    writer.clear_progress()
    return paths


def test_gguf_py_reads_it_back(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        assert reader.fields[key].contents() == value.data, key
    assert [t.name for t in reader.tensors] == [t.name for t in TENSORS]
    for found, tensor in zip(reader.tensors, TENSORS, strict=True):
        assert tuple(reversed(found.shape.tolist())) == tensor.shape
        assert found.tensor_type.name == tensor.type
        assert found.data_offset % 32 == 0
        assert found.data.tobytes() == content(tensor).tobytes()


def test_parts_stay_under_the_limit_and_first_carries_all_metadata(tmp_path: Path) -> None:
    limit = 2600
    paths = write(tmp_path, limit)
    assert [p.name for p in paths] == [f"m-{i + 1:05d}-of-{len(paths):05d}.gguf" for i in range(len(paths))]
    assert len(paths) > 1
    names = []
    for index, path in enumerate(paths):
        assert path.stat().st_size <= limit
        fields = gguf.GGUFReader(path).fields
        assert (fields["split.no"].contents(), fields["split.count"].contents()) == (index, len(paths))
        assert fields["split.tensors.count"].contents() == len(TENSORS)
        assert ("a.texts" in fields) == (index == 0)
        names += [t.name for t in gguf.GGUFReader(path).tensors]
    assert names == [t.name for t in TENSORS]


def test_a_tensor_above_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="864 bytes do not fit"):
        plan_parts("m", {}, TENSORS, 1800)


@pytest.mark.parametrize("limit", [10**9, 2600])
@pytest.mark.parametrize("stop", range(1, len(TENSORS)))
def test_an_interrupted_file_continues_with_the_same_bytes(tmp_path: Path, limit: int, stop: int) -> None:
    whole = [p.read_bytes() for p in write(tmp_path / "whole", limit)]
    write(tmp_path / "cut", limit, stop)
    for path in (tmp_path / "cut").glob("*.tmp"):  # bytes behind the last checkpoint
        path.write_bytes(path.read_bytes() + b"half a tensor")
    paths = write(tmp_path / "cut", limit)
    assert [p.read_bytes() for p in paths] == whole
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [p.name for p in paths]


def test_digests_are_the_files(tmp_path: Path) -> None:
    write(tmp_path, 2600, 4)
    writer = GgufWriter(tmp_path, plan_parts("m", METADATA, TENSORS, 2600))
    for tensor in TENSORS[writer.done :]:
        writer.write(tensor.name, content(tensor))
    for path in writer.finish():
        assert writer.sha256[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_killed_between_rename_and_journal(tmp_path: Path) -> None:
    whole = [p.read_bytes() for p in write(tmp_path / "whole")]
    writer = GgufWriter(tmp_path / "cut", plan_parts("m", METADATA, TENSORS))
    for index, tensor in enumerate(TENSORS):
        writer.write(tensor.name, content(tensor))
        if index == 2:
            writer.checkpoint()
    writer.settle()
    assert (tmp_path / "cut" / "m.gguf").exists()
    assert [p.read_bytes() for p in write(tmp_path / "cut")] == whole


def test_another_run_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    write(tmp_path, stop=3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"progress\.json: an unfinished run of another layout .*--fresh"):
        GgufWriter(tmp_path, plan_parts("m", METADATA, TENSORS), {"seed": 1})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_sigkill(tmp_path: Path) -> None:
    """A process that is killed while it writes layer after layer loses at most the layer it was in."""

    def work() -> None:
        writer = GgufWriter(tmp_path / "cut", plan_parts("m", METADATA, TENSORS))
        for tensor in TENSORS:
            writer.write(tensor.name, content(tensor))
            if tensor.name == "blk.0.k":
                os.kill(os.getpid(), signal.SIGKILL)
            writer.checkpoint()

    process = forked(work)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not list((tmp_path / "cut").glob("*.gguf"))
    assert GgufWriter(tmp_path / "cut", plan_parts("m", METADATA, TENSORS)).done == 3
    assert [p.read_bytes() for p in write(tmp_path / "cut")] == [p.read_bytes() for p in write(tmp_path / "whole")]
