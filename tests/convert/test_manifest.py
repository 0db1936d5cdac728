"""Manifests are valid and add up; M2.7's sizes equal arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from helpers.tiny import write_tiny
from mmquant.convert import manifest
from mmquant.convert.files.lock import hold
from mmquant.convert.files.schemas import schema
from mmquant.convert.fitting.weights import Weights
from mmquant.convert.hub import card
from mmquant.convert.manifest import Artifact, FileEntry
from mmquant.convert.open import open_native
from mmquant.errors import InputError
from mmquant.runs.native import write_native


def written(folder: Path) -> None:
    source = open_native("demo")
    files = (FileEntry("x.safetensors", 3, "0" * 64),)
    artifact = Artifact("x", "compressed-tensors", "X", ".", files, Weights(10, (1, 2, 3, 4)), {"run": {}})
    manifest.write(folder, manifest.build(source, artifact, "0"))


def test_a_manifest_is_valid_and_takes_a_quality_block(tmp_path: Path) -> None:
    written(tmp_path)
    found = json.loads((tmp_path / manifest.MANIFEST).read_text())
    jsonschema.validate(found, schema("fit"))
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
