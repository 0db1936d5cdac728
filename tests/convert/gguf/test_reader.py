"""The GGUF reader equals gguf-py's, and refuses hostile headers."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.tiny import write_tiny
from mmquant.convert.checkpoints.store import LocalFolder
from mmquant.convert.gguf.header import read_header
from mmquant.convert.gguf.names import EXPERT_TENSORS, all_shapes, gguf_name, is_quantizable, release_name, split_block
from mmquant.convert.gguf.reader import GgufSource, find_parts
from mmquant.convert.models.minimax_m2.names import NAMES
from mmquant.convert.open import open_native, open_source
from mmquant.convert.source import read_layer
from mmquant.quantize.ggml.types import GGMLType

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_local_experts": 3}
SIZES |= {"num_attention_heads": 8, "vocab_size": 64}
READ_BY_BOTH = [kind for kind in GGMLType if kind.name not in ("F32",)]


def write(path: Path, kind: str = "BF16", shapes: dict[str, tuple[int, ...]] | None = None, **split: Any) -> Path:
    """A tiny model by gguf-py's writer; matrices of `kind` hold random bytes with small, finite scales."""
    source = open_native(write_tiny(path.parent / "source", **SIZES))
    g, rng = source.geometry, np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "minimax-m2", **split)
    for name, value in (
        ("block_count", g.layers), ("embedding_length", g.hidden), ("feed_forward_length", g.expert_width),
        ("attention.head_count", g.heads), ("attention.head_count_kv", g.kv_heads), ("expert_count", g.experts),
        ("attention.key_length", g.head_dim), ("attention.value_length", g.head_dim), ("context_length", 512),
        ("expert_used_count", g.experts_per_token), ("expert_gating_func", 2), ("rope.dimension_count", g.rotary_dim),
    ):  # fmt: skip
        writer.add_uint32(f"minimax-m2.{name}", value)
    writer.add_float32("minimax-m2.rope.freq_base", g.rope_theta)
    writer.add_float32("minimax-m2.attention.layer_norm_rms_epsilon", g.norm_eps)
    writer.add_token_list([f"t{i}" for i in range(g.vocab)])
    for name, shape in (shapes or all_shapes(g)).items():
        values = rng.normal(size=shape).astype(np.float32)
        if not is_quantizable(name, shape) or kind == "F32":
            writer.add_tensor(name, values)
            continue
        number = gguf.GGMLQuantizationType[kind]
        rows = GGMLType[kind].row_bytes(shape[-1])
        if kind in ("BF16", "F16", "Q8_0", "Q4_0", "Q5_0"):
            data = gguf.quants.quantize(values, number)
        else:
            data = rng.integers(0, 0x3C, (*shape[:-1], rows), dtype=np.uint8)
        writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", "Q8_0")


@pytest.mark.parametrize("kind", READ_BY_BOTH, ids=lambda kind: kind.name)
def test_every_type_has_the_values_of_gguf_py(tmp_path: Path, kind: GGMLType) -> None:
    path = write(tmp_path / "model.gguf", kind.name)
    source = open_source(path)
    assert isinstance(source, GgufSource)
    source.validate()
    for tensor in gguf.GGUFReader(path).tensors:
        layer, rest = split_block(tensor.name)
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if rest.endswith("_exps.weight"):
            assert layer is not None
            projection = EXPERT_TENSORS[rest.removesuffix(".weight")]
            found = source.read_experts(layer, projection, range(3), "cpu", torch.float32)
            one = source.read(release_name(NAMES, tensor.name, 1))
            assert torch.equal(one, found[1])
            assert torch.equal(source.read_experts(layer, projection, range(1, 2), "cpu", torch.float32)[0], one)
        else:
            found = source.read(release_name(NAMES, tensor.name))
        np.testing.assert_array_equal(found.numpy(), wanted.reshape(found.shape), err_msg=tensor.name)


def test_names_go_both_ways(plain: Path) -> None:
    source = GgufSource(plain)
    for name, shape in all_shapes(source.geometry).items():
        experts = range(3) if len(shape) == 3 else [None]
        for expert in experts:
            assert gguf_name(NAMES, release_name(NAMES, name, expert)) == (name, expert)
    for name in ("model.layers.0.self_attn.qkv.weight", "lm_head", "model.layers.x.gate"):
        with pytest.raises(ValueError, match="not a weight of this architecture"):
            gguf_name(NAMES, name)


def test_geometry_is_the_sources(plain: Path) -> None:
    source, truth = GgufSource(plain), open_native(plain.parent / "source")
    for name in type(truth.geometry).__dataclass_fields__:
        assert getattr(source.geometry, name) == pytest.approx(getattr(truth.geometry, name)), name
    assert source.bytes == sum(t.n_bytes for t in gguf.GGUFReader(plain).tensors)
    assert read_layer(source, 1).gate.shape == (3, 256, 256)


def test_split_files_are_one_model(tmp_path: Path, plain: Path) -> None:
    whole = GgufSource(plain)
    write(tmp_path / "model.gguf", "Q8_0", split_max_tensors=7)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    for path in (parts[0], parts[-1], tmp_path):
        source = GgufSource(path)
        source.validate()
        assert source.bytes == whole.bytes
        for name in ("model.norm.weight", "model.layers.1.block_sparse_moe.experts.2.w2.weight", "lm_head.weight"):
            assert torch.equal(source.read(name), whole.read(name))
    parts[1].unlink()
    with pytest.raises(ValueError, match=f"1 of {len(parts)} parts are missing"):
        GgufSource(parts[0])


def test_the_next_layer_is_read_ahead(plain: Path) -> None:
    source = GgufSource(plain)
    read_layer(source, 0)
    source.ahead.join()
    sizes = [t.size for f in source.files for name, t in f.tensors.items() if split_block(name)[0] == 1]
    assert source.ahead.bytes == sum(sizes) > 0
    read_layer(source, 1)
    source.ahead.join()
    assert source.ahead.bytes == sum(sizes)


def test_a_folder_with_two_models_is_ambiguous(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"2 GGUF models \(a.gguf, b.gguf\), expected one"):
        find_parts(tmp_path)


def patched(path: Path, target: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) == 1, data.count(old)
    target.write_bytes(data.replace(old, new))
    return target


def info(name: str, shape: tuple[int, ...], kind: int, offset: int | None = None) -> bytes:
    """A tensor's entry as it stands in the header, or its beginning without the offset."""
    raw = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
    raw += b"".join(struct.pack("<Q", n) for n in reversed(shape)) + struct.pack("<I", kind)
    return raw if offset is None else raw + struct.pack("<Q", offset)


def test_hostile_entries(plain: Path, tmp_path: Path) -> None:
    name, shape = "blk.1.ffn_down_exps.weight", (3, 256, 256)
    entry = info(name, shape, 8)
    at = read_header(plain).tensors[name].offset
    first = min(t.offset for t in read_header(plain).tensors.values())
    whole = info(name, shape, 8, at - first)
    cases = {
        "ends at": info(name, shape, 8, 1 << 40),
        "expected a multiple of 32": info(name, shape, 8, at - first + 1),
        "has ggml type 99, expected one of": info(name, shape, 99, at - first),
        "is damaged": info(name, (3, 1 << 40, 1 << 40), 8, at - first),
        "rows of 255": info(name, (3, 256, 255), 8, at - first),
        "inside": info(name, shape, 8, 0),
        "ends": info(name, (3, 256, 1 << 20), 8, at - first),
    }
    assert entry in plain.read_bytes()
    for message, changed in cases.items():
        with pytest.raises(ValueError, match=message):
            GgufSource(patched(plain, tmp_path / "bad.gguf", whole, changed))
    swapped = GgufSource(patched(plain, tmp_path / "bad.gguf", whole, info(name, (3, 128, 512), 8, at - first)))
    with pytest.raises(ValueError, match=re.escape("has shape [3, 128, 512], expected [3, 256, 256]")):
        swapped.validate()


def test_hostile_beginnings(plain: Path, tmp_path: Path) -> None:
    data, bad = plain.read_bytes(), tmp_path / "bad.gguf"
    cases = {
        "begins with b'GGUX'": b"GGUX" + data[4:],
        "GGUF version 1": data[:4] + struct.pack("<I", 1) + data[8:],
        "big-endian GGUF is not read": data[:4] + struct.pack(">I", 3) + data[8:],
        "tensors in": data[:8] + struct.pack("<Q", 1 << 62) + data[16:],
        "metadata pairs in": data[:16] + struct.pack("<Q", 1 << 61) + data[24:],
        "magic of 4 bytes at 0": b"",
        "cut off": data[: len(data) // 2],
    }
    for message, content in cases.items():
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            GgufSource(bad)
    with pytest.raises(ValueError, match="no such file"):
        GgufSource(tmp_path / "none.gguf")


def test_sizes_that_no_file_holds(plain: Path, tmp_path: Path) -> None:
    """Billions of layers or experts are refused before they are listed."""
    for key in ("block_count", "expert_count"):
        name = f"minimax-m2.{key}".encode()
        data, size = plain.read_bytes(), 4
        at = data.index(name) + len(name) + 4
        (tmp_path / "bad.gguf").write_bytes(data[:at] + b"\xff\xff\xff\xff" + data[at + size :])
        with pytest.raises(ValueError, match="4294967295"):
            GgufSource(tmp_path / "bad.gguf").validate()


def test_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture is 'llama', expected 'minimax-m2'"):
        open_source(tmp_path / "llama.gguf")


def test_missing_and_foreign_tensors(tmp_path: Path, plain: Path) -> None:
    shapes = all_shapes(GgufSource(plain).geometry)
    missing = {name: shape for name, shape in shapes.items() if name != "blk.1.attn_k.weight"}
    with pytest.raises(ValueError, match=r"1 tensors are missing, first blk\.1\.attn_k\.weight"):
        GgufSource(write(tmp_path / "missing.gguf", "F16", missing)).validate()
    with pytest.raises(ValueError, match=r"1 tensors are not part of this model, first blk.0.extra.weight"):
        GgufSource(write(tmp_path / "extra.gguf", "F16", shapes | {"blk.0.extra.weight": (2, 2)})).validate()
    GgufSource(write(tmp_path / "mtp.gguf", "F16", shapes | {"blk.2.attn_k.weight": (2, 2)})).validate()


def one_line(error: Exception) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 4096


def flipped(data: bytes, draw: st.DrawFn, header: int) -> bytes:
    """Random bytes changed in the header, whole words made huge, or the length changed."""
    broken = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, header - 9))
        if draw(st.booleans()):
            broken[at] = draw(st.integers(0, 255))
        else:
            broken[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x7f", b"\x01" * 8]))
    length = draw(st.sampled_from([len(data), len(data), header, header // 2, len(data) - 1, len(data) + 7]))
    return bytes(broken[:length]) + b"\x00" * max(0, length - len(data))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_gguf_headers_give_one_line(plain: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = plain.read_bytes()
    header = read_header(plain).header_bytes
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data.draw(st.composite(lambda draw: flipped(whole, draw, header))()))
    try:
        source = GgufSource(bad)
        source.validate()
        source.read("model.layers.1.self_attn.q_proj.weight")
    except (ValueError, OSError) as error:
        one_line(error)


@pytest.mark.parametrize("value", [10, 14])  # a line feed in a name, a length of thousands of bytes
def test_every_byte_of_a_gguf_header_may_be_wrong(plain: Path, tmp_path: Path, value: int) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(plain.read_bytes())
    with bad.open("r+b", buffering=0) as file:
        for at in range(read_header(plain).header_bytes):
            kept = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([value]), at)
            try:
                GgufSource(bad).validate()
            except ValueError as error:
                one_line(error)
            os.pwrite(file.fileno(), kept, at)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_safetensors_headers_give_one_line(plain: Path, tmp_path: Path, data: st.DataObject) -> None:
    shard = plain.parent / "source" / "model-00001-of-00003.safetensors"
    whole = shard.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    (tmp_path / "bad.safetensors").write_bytes(data.draw(st.composite(lambda draw: flipped(whole, draw, header))()))
    try:
        tensors = LocalFolder(tmp_path).header("bad.safetensors")
        assert sum(t.size for t in tensors) <= len(whole) + 7
    except (ValueError, OSError) as error:
        one_line(error)
