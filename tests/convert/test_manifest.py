"""Manifests are valid and add up; M2.7's sizes equal arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from helpers.tiny import write_tiny
from mmquant.convert import manifest
from mmquant.convert.files.lock import hold
from mmquant.convert.fit import Device, Weights, kv_table, targets, verdict
from mmquant.convert.hub import card
from mmquant.convert.manifest import Artifact, FileEntry
from mmquant.convert.manifest_check import schema
from mmquant.convert.models.minimax_m2 import Geometry
from mmquant.convert.open import open_native
from mmquant.errors import InputError
from mmquant.runs.folder import write_native

M27 = Geometry(62, 3072, 48, 8, 128, 256, 8, 1536, 200064, 64, 5e6, 1e-6, 196608)
W4 = Weights(8_018_576_384, (115_850_870_784 // 62,) * 62)
IQ4 = Weights(3_949_239_746, (1_716_812_513,) * 62)


@pytest.mark.parametrize("format", ["compressed-tensors", "gguf", "awq"])
@pytest.mark.parametrize("weights", [W4, IQ4, Weights(10**6, (10**6,) * 62), Weights(10**11, (4 * 10**9,) * 62)])
def test_budgets_add_up(format: str, weights: Weights) -> None:
    found = targets("x", format, ".", weights, M27)
    assert {t["id"] for t in found} == {"2xA100-80GB", "24GB-GPU+RAM"}
    for target in found:
        assert target["basis"] == "estimated"
        assert target["context_tokens"] in (range(256, M27.max_context + 1) if target["fits"] != "no" else [0])
        assert bool(target["launch"]["argv"]) == (target["fits"] != "no")
        assert sum(row["weights"] for row in target["budget"]) in range(weights.total, weights.total + 2)
        for row in target["budget"]:
            assert row["used"] == row["weights"] + row["kv"] + row["compute"] + row["runtime"]
            assert row["margin"] == row["usable"] - row["used"]
        short = any(row["margin"] < 256 * kv_table(M27)["f16"] for row in target["budget"] if row["kv"] == 0)
        assert (target["fits"] == "no") == (short or any(row["margin"] < 0 for row in target["budget"]))


def test_int4_of_m27_fits_two_a100_with_about_a_hundred_thousand_tokens() -> None:
    """hubs and engines report 90-103 thousand tokens of bf16 KV cache at utilization 0.92 for this file."""
    target = targets("x", "compressed-tensors", ".", W4, M27)[0]
    assert target["fits"] in ("yes", "tight")
    assert 85_000 < target["context_tokens"] < 125_000


def test_a_24_gb_card_keeps_most_experts_in_ram() -> None:
    """IQ4_XS at 32K: about 56 of 62 expert layers on the CPU and 90 GiB of RAM."""
    target = targets("x", "gguf", "f.gguf", IQ4, M27)[1]
    assert 53 <= target["placement"]["n_cpu_moe"] <= 58
    assert target["hardware"]["host_ram"] in (96 * 10**9, 128 * 10**9)
    assert target["launch"]["argv"][-2:] == ["--n-cpu-moe", str(target["placement"]["n_cpu_moe"])]


def test_fp8_of_m27_does_not_fit_two_a100() -> None:
    weights = Weights(8 * 10**9, (222 * 10**9 // 62,) * 62)
    assert targets("x", "compressed-tensors", ".", weights, M27)[0]["fits"] == "no"


def test_kv_cache_of_m27() -> None:
    assert kv_table(M27) == {"f16": 253952, "fp8": 126976, "q8_0": 134912, "q4_0": 71424}


def test_the_smallest_margin_decides() -> None:
    roomy, close = Device("a", 100, 1, 1, 1, 1), Device("b", 100, 97, 1, 1, 0)
    assert (verdict([roomy]), verdict([roomy, close]), verdict([Device("c", 10, 11, 0, 0, 0)])) == (
        "yes",
        "tight",
        "no",
    )


def written(folder: Path) -> None:
    source = open_native("demo")
    files = (FileEntry("x.safetensors", 3, "0" * 64),)
    artifact = Artifact("x", "compressed-tensors", "X", ".", files, Weights(10, (1, 2, 3, 4)), {"run": {}})
    manifest.write(folder, manifest.build(source, artifact, "0"))


def test_a_manifest_is_valid_and_takes_a_quality_block(tmp_path: Path) -> None:
    written(tmp_path)
    found = json.loads((tmp_path / manifest.MANIFEST).read_text())
    jsonschema.validate(found, schema())
    assert found["license"]["commercial_use"] == "allowed"
    manifest.set_quality(tmp_path, {"status": "pass", "metrics": {"ppl": 1.5}})
    after = manifest.read(tmp_path)
    assert after is not None
    assert after["artifacts"][0]["quality"]["metrics"] == {"ppl": 1.5}


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a\\b", "x\0", "", ".git/config", "a\u202eb"])
@pytest.mark.parametrize("key", ["path", "entry"])
def test_paths_of_a_manifest_stay_in_its_folder(tmp_path: Path, path: str, key: str) -> None:
    written(tmp_path)
    found = json.loads((tmp_path / manifest.MANIFEST).read_text())
    artifact = found["artifacts"][0]
    (artifact if key == "entry" else artifact["files"][0])[key] = path
    (tmp_path / manifest.MANIFEST).write_text(json.dumps(found))
    for read in (manifest.read, card.read_manifest):
        with pytest.raises(InputError, match="the path"):
            read(tmp_path)


def test_a_quality_block_has_a_status(tmp_path: Path) -> None:
    written(tmp_path)
    found = json.loads((tmp_path / manifest.MANIFEST).read_text())
    found["artifacts"][0]["quality"] = {}
    (tmp_path / manifest.MANIFEST).write_text(json.dumps(found))
    with pytest.raises(InputError, match="status"):
        card.read_manifest(tmp_path)


def test_a_broken_manifest_is_one_line(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / manifest.MANIFEST
    path.write_text(path.read_text().replace('"mmquant-fit"', '"other"'))
    with pytest.raises(ValueError, match=r"mmquant\.fit\.json: \$\.schema: ") as caught:
        manifest.read(tmp_path)
    assert "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        manifest.read(tmp_path)


def test_files_are_held_against_the_manifest(tmp_path: Path) -> None:
    source = open_native(write_tiny(tmp_path / "model", num_hidden_layers=1))
    out = write_native(source, tmp_path / "out")
    manifest.check_files(out)
    shard = out / "model-00001-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    write_native(source, out)  # finished, and the sizes are right
    with pytest.raises(InputError, match=r"00001-of-00003\.safetensors: SHA-256 .* not the bytes as written"):
        manifest.check_files(out)
    shard.write_bytes(data[:-1])
    for use in (lambda: manifest.check_files(out), lambda: write_native(source, out)):
        with pytest.raises(InputError, match=rf"{len(data) - 1} bytes, mmquant\.fit\.json says {len(data)}"):
            use()
    shard.unlink()
    with pytest.raises(InputError, match=r"no such file, mmquant\.fit\.json lists it"):
        manifest.check_files(out)


def test_quality_blocks_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_native(open_native(write_tiny(tmp_path / "model", num_hidden_layers=1)), tmp_path / "out")
    monkeypatch.setattr(manifest, "QUALITY_WAIT", 0.0)
    before = (out / "mmquant.fit.json").read_bytes()
    with hold(out), pytest.raises(InputError, match=r"in use by process \d+"):
        manifest.set_quality(out, {"status": "not-measured"})
    assert (out / "mmquant.fit.json").read_bytes() == before
