"""Importance matrices equal llama-imatrix's bytes, are read back by gguf, and are refused when broken."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from helpers.paths import DATA
from mmquant.convert.gguf.imatrix import Imatrix, Importance, imatrix_bytes, read_imatrix, split_matrices, write_imatrix
from mmquant.errors import InputError

# Made by llama-imatrix (llama.cpp 0c1e57098) over 200 chunks of 512 tokens from the demo model.
THEIRS = DATA / "imatrix.gguf"


def importance(matrices: int, inputs: int, seed: int = 0) -> Importance:
    rng = np.random.default_rng(seed)
    sums = rng.random((matrices, inputs), dtype=np.float32) * 100
    return Importance(sums, rng.integers(0, 50, matrices).astype(np.float32))


def test_what_llama_imatrix_wrote_comes_back_byte_for_byte(tmp_path: Path) -> None:
    found = read_imatrix(THEIRS)
    assert (found.chunk_count, found.chunk_size, found.datasets) == (200, 512, ("calib.txt",))
    assert len(found.weights) == 4 * 8
    assert set(found.layer(3)) == {
        *("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp"),
        *("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
    }
    assert found.weights["blk.0.ffn_down_exps.weight"].sums.shape == (16, 256)
    write_imatrix(tmp_path / "ours.gguf", found)
    assert (tmp_path / "ours.gguf").read_bytes() == THEIRS.read_bytes()


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 70)), min_size=1, max_size=4), st.text(max_size=9))
def test_gguf_reads_what_is_written(tmp_path_factory: pytest.TempPathFactory, shapes: list, dataset: str) -> None:
    weights = {f"blk.{n}.w{n}.weight": importance(m, i, n) for n, (m, i) in reversed([*enumerate(shapes)])}
    dataset = dataset.encode("utf-8", "ignore").decode()
    path = tmp_path_factory.mktemp("imatrix") / "i.gguf"
    write_imatrix(path, Imatrix(weights, (dataset, "b"), 3, 77))
    reader = GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == [dataset, "b"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].contents() == 77
    tensors = {t.name: t for t in reader.tensors}
    names = [t.name for t in reader.tensors if t.name.endswith(".in_sum2")]
    assert names == sorted(names)
    for name, value in weights.items():
        matrices, inputs = value.sums.shape
        sums, counts = tensors[name + ".in_sum2"], tensors[name + ".counts"]
        assert list(sums.shape) == ([inputs, matrices] if matrices > 1 else [inputs])
        assert np.array_equal(np.ravel(sums.data), np.ravel(value.sums))
        assert np.array_equal(np.ravel(counts.data), value.counts)
        assert sums.data_offset % 32 == 0
    again = read_imatrix(path)
    assert again.datasets == (dataset, "b")
    assert imatrix_bytes(again) == path.read_bytes()


def test_an_expert_without_tokens_weighs_all_channels_alike() -> None:
    value = Importance(np.array([[2.0, 4.0], [0.0, 0.0]], np.float32), np.array([2.0, 0.0], np.float32))
    assert value.mean().tolist() == [[1.0, 2.0], [1.0, 1.0]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("where", ["sums", "counts"])
def test_values_that_llama_cpp_refuses_are_refused(value: float, where: str) -> None:
    bad = importance(2, 3)
    getattr(bad, where).flat[1] = value
    with pytest.raises(ValueError, match=f"blk.0.x.weight: {where} hold NaN, infinity or negative numbers"):
        imatrix_bytes(Imatrix({"blk.0.x.weight": bad}, ("a",), 1, 1))


def test_files_that_are_no_imatrix_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file, expected an imatrix"):
        read_imatrix(tmp_path / "missing.gguf")
    legacy = tmp_path / "old.dat"
    legacy.write_bytes(b"\x08\0\0\0rest")
    with pytest.raises(InputError, match="expected an imatrix, in GGUF or the older"):
        read_imatrix(legacy)
    for name, data in (
        ("none", b""),
        ("many", struct.pack("<i", 2**31 - 1) + bytes(60)),
        ("long", struct.pack("<iii", 1, 2**30, 0) + bytes(60)),
        ("short", struct.pack("<ii1sii", 1, 1, b"a", 3, 2**30) + bytes(60)),
        ("never", struct.pack("<ii1siif", 1, 1, b"a", 0, 1, 1.0)),
        ("nan", struct.pack("<ii1siif", 1, 1, b"a", 1, 1, float("nan"))),
        ("text", b"{}" * 99),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ):
        legacy.write_bytes(data)
        with pytest.raises(InputError) as caught:
            read_imatrix(legacy)
        assert "\n" not in str(caught.value), name
    assert "git-lfs pointer" in str(caught.value)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(THEIRS.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged or cut off"):
        read_imatrix(cut)
    other = tmp_path / "other.gguf"
    other.write_bytes(THEIRS.read_bytes().replace(b"imatrix.chunk_size", b"imatrix.chunk_sizf"))
    with pytest.raises(ValueError, match=r"imatrix\.chunk_size is missing"):
        read_imatrix(other)
    lost = tmp_path / "lost.gguf"
    lost.write_bytes(THEIRS.read_bytes().replace(b"blk.0.attn_q.weight.counts", b"blk.0.attn_q.weight.countz"))
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight\.counts is missing"):
        read_imatrix(lost)


def legacy_bytes(found: Imatrix, dataset: str | None) -> bytes:
    """The older form as llama-imatrix wrote it: means times calls, one flat row for all experts."""
    out = struct.pack("<i", len(found.weights))
    for name, value in found.weights.items():
        values = (value.mean() * found.chunk_count).astype("<f4")
        raw = name.encode()
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", found.chunk_count, values.size) + values.tobytes()
    return out if dataset is None else out + struct.pack("<ii", found.chunk_count, len(dataset)) + dataset.encode()


@pytest.mark.parametrize("dataset", [None, "c.txt"])
def test_the_older_form_gives_the_same_means_by_any_name(tmp_path: Path, dataset: str | None) -> None:
    theirs = read_imatrix(THEIRS)
    path = tmp_path / "imatrix.whatever"
    path.write_bytes(legacy_bytes(theirs, dataset))
    found = read_imatrix(path)
    assert found.datasets == (() if dataset is None else (dataset,))
    assert found.chunk_count == theirs.chunk_count
    assert found.weights.keys() == theirs.weights.keys()
    for name, value in theirs.weights.items():
        mine = split_matrices(found.weights[name], len(value.counts))
        seen = mine.counts > 0
        np.testing.assert_allclose(mine.mean()[seen], value.mean()[seen], rtol=1e-5)
        assert (seen == (value.counts > 0)).all()


def test_one_entry_serves_all_weights_that_see_the_same_input() -> None:
    value = Importance(np.ones((1, 4), np.float32), np.ones(1, np.float32))
    for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_up_gate_exps"):
        found = Imatrix({f"blk.2.{name}.weight": value}, (), 1, 1).layer(2)
        assert found["ffn_gate_exps"] is value
        assert found["ffn_up_exps"] is value
        assert "attn_q" not in found
    assert Imatrix({"blk.2.attn_qkv.weight": value}, (), 1, 1).layer(2)["attn_v"] is value
    other = Importance(np.zeros((1, 4), np.float32), np.ones(1, np.float32))
    both = Imatrix({"blk.2.attn_k.weight": value, "blk.2.attn_q.weight": other}, (), 1, 1).layer(2)
    assert both["attn_k"] is value
