"""The card is for people: short whatever it holds, one row a type, and everything else is named where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.m27 import M27
from mmquant.convert.fitting.catalog import find_rows
from mmquant.convert.fitting.manifest import target_blocks
from mmquant.convert.fitting.text import fit_text
from mmquant.convert.hub.card import Place, published
from mmquant.convert.hub.card_text import generated
from mmquant.convert.manifest import geometry_block
from mmquant.convert.manifest_check import check_manifest

TYPES = ("IQ2_M", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
QUALITY = {
    "status": "measured",
    "reference": "the FP8 release",
    "corpus": {"sha256": "c" * 64, "windows": 128, "context": 2048},
    "metrics": {"ppl": 6.25, "kld": {"mean": 0.0125, "p999": 0.5}, "top1": 0.975, "nonfinite": 0},
}


def artifact(type: str) -> dict[str, Any]:
    weights = find_rows(type)[0].weigh(M27)
    names = [f"M2.7-{type}-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    files = [{"path": name, "size": weights.total // 3, "sha256": "0" * 64} for name in [*names, "LICENSE"]]
    sets = [{"name": "chat", "sha256": "a" * 64, "windows": list(range(100))}, {"name": "code", "sha256": "b" * 64}]
    return {
        "id": f"GGUF-{type}",
        "format": "gguf",
        "quant_label": type,
        "bits_per_weight": 8 * weights.total / M27.parameters,
        "entry": names[0],
        "files": files,
        "weights": {"total": weights.total, "resident": weights.resident, "experts": weights.experts, "basis": "exact"},
        "quality": QUALITY,
        "provenance": {
            "run": {"command": "gguf", "type": type, "calibration": {"corpus": {"sets": sets}}},
            "command_line": ["mmquant", "gguf", "--model", "hf:a/b@" + "1" * 40, "--type", type, "--windows", "32"],
        },
    }


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    artifacts = [artifact(type) for type in TYPES]
    targets = []
    for one, type in zip(artifacts, TYPES, strict=True):
        weights = find_rows(type)[0].weigh(M27)
        targets += target_blocks(one["id"], "gguf", one["entry"], weights, M27, {"command": "gguf", "type": type})
    whole = {
        "schema": "mmquant-fit",
        "schema_version": "1.1",
        "generator": {"name": "mmquant", "version": "0.1.0"},
        "model": {
            "base_model": "MiniMaxAI/MiniMax-M2.7",
            "base_revision": "1" * 40,
            "source": "huggingface",
            "architecture": "minimax_m2",
            "geometry": geometry_block(M27),
            "kv_bytes_per_token": {"f16": 1},
            "max_context_tokens": M27.max_context,
        },
        "license": {"spdx_or_name": "x", "link": "", "commercial_use": "prohibited-without-authorization"},
        "artifacts": artifacts,
        "targets": targets,
    }
    moved = {f["path"]: f"{a['quant_label']}/{f['path']}" for a in artifacts for f in a["files"] if "gguf" in f["path"]}
    return published(whole, Place("hf", "me/M2.7-GGUF"), moved)


def test_the_manifest_holds_to_its_schema(manifest: dict[str, Any]) -> None:
    check_manifest(manifest, "x")
    for target in manifest["targets"]:
        for row in target["budget"]:
            parts = ("weights", "kv", "compute", "staging", "runtime")
            assert sum(row[part] for part in parts) == row["used"] == row["usable"] - row["margin"]


def test_the_card_of_eight_types_is_short(manifest: dict[str, Any]) -> None:
    text = generated(manifest, "hf", "me/M2.7-GGUF", "")
    assert len(text.splitlines()) < 120
    assert len(text) < 12_000
    for type in TYPES:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {type} |") and "-hf" in line]
        assert f"`llama-server -hf me/M2.7-GGUF:{type}`" in row
    rows = [line for line in text.splitlines() if "-hf me" in line and line.startswith("| ")]
    sizes = [float(row.split("|")[2]) for row in rows]
    assert sizes == sorted(sizes)
    assert "| Q4_K_M | 138.33 | 4.84 | 0.0125 | 0.975 | 24GB+128GB (32K)" in text
    assert text.count("LICENSE") == 1 * 2  # the link's text and its target
    for said in ('--include "Q4_K_M/*"', "temperature 1.0, top_p 0.95, top_k 40", "--jinja", "<think>", "]~b]user"):
        assert said.replace("Q4_K_M", TYPES[0]) in text
    assert "mmquant gguf --model hf:a/b@" + "1" * 40 + " --type Q2_K".replace("Q2_K", "IQ2_M") + " --windows 32" in text
    assert "Calibrated on chat, code." in text
    assert "| Q4_K_M | measured | 6.25 | - | 0.5 | 0 |" in text
    assert "pass" not in text.split("## Quality")[1].split("##")[0]


def test_no_row_hides_its_ram(manifest: dict[str, Any]) -> None:
    text = fit_text(manifest)
    table = [line for line in text.splitlines() if line.startswith(("| 24GB", "| 2x", "| 4x", "| 32GB", "| 96GB"))]
    assert table
    assert all("GiB RAM" in line for line in table if "unified" not in line)
    assert "GiB missing" in next(line for line in table if line.startswith("| 24GB |"))


def test_commands_of_a_repository_start_from_it(manifest: dict[str, Any]) -> None:
    first = next(t for t in manifest["targets"] if t["fits"] == "yes" and t["artifact"] == "GGUF-Q4_K_M")
    assert first["launch"]["argv"][:3] == ["llama-server", "-hf", "me/M2.7-GGUF:Q4_K_M"]
    studio = next(o for o in first["alternatives"] if o["engine"] == "lm studio")
    assert "Q4_K_M/M2.7-Q4_K_M-00001-of-00003.gguf" in studio["argv"][2]


def test_the_command_line_is_recorded_with_what_was_changed(tmp_path: Path) -> None:
    import mmquant
    from mmquant import Fp8Options

    made = mmquant.quantize_fp8("demo", tmp_path / "o", Fp8Options(scheme="channel"))
    line = made.manifest()["artifacts"][0]["provenance"]["command_line"]
    assert line == ["mmquant", "fp8", "--model", "demo", "--scheme", "channel", "--out", "FP8-channel"]
    assert json.loads((made.path / "mmquant.fit.json").read_text())["schema_version"] == "1.1"
    assert (made.path / "FIT.md").read_text().startswith("# What runs where")
