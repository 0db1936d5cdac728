"""`mmquant push` against a real HTTP server of both hubs: content, commits, refusals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.command import mmquant
from helpers.hub_server import TOKEN, HubServer
from helpers.killed import kill, until
from mmquant.commands.terminal import Terminal
from mmquant.convert.hub.card import BEGIN, END
from mmquant.convert.hub.http import Client, HubError, Retry, TransferError
from mmquant.convert.hub.hubs import endpoint_of, remote_of
from mmquant.convert.hub.layout import check_layout, find_by_tag
from mmquant.convert.hub.modelscope import same_site
from mmquant.errors import MmquantError
from mmquant.monitor import watching
from mmquant.runs.options_use import PushOptions
from mmquant.runs.push import push_to

LICENSE = "NON-COMMERCIAL LICENSE\n\nCopyright (c) 2026 MiniMax\n\nCommercial use requires authorization.\n"
BASE_CARD = "---\nlicense: other\nlicense_name: modified-mit\nlicense_link: https://example.org/LICENSE\n---\n# M2.7\n"
REVISION = "1" * 40
QUICK = Retry(attempts=3, base=0.01, cap=0.05, stall=5.0)
WEIGHTS = 120_000


def manifest_of(label: str, format: str, entry: str, files: dict[str, bytes], **model: str) -> dict[str, Any]:
    base = {"base_model": "MiniMaxAI/MiniMax-M2.7", "base_revision": REVISION, "source": "local", **model}
    listed = [{"path": p, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for p, d in files.items()]
    argv = ["llama-server", "-m", entry, "-c", "4096"] if format == "gguf" else ["vllm", "serve", entry]
    target = {
        "id": "24GB-GPU+RAM",
        "artifact": label,
        "engine": "llama.cpp" if format == "gguf" else "vllm",
        "hardware": {"gpus": [], "host_ram": 1},
        "fits": "tight",
        "context_tokens": 4096,
        "budget": [],
        "launch": {"argv": argv},
        "basis": "estimated",
    }
    artifact = {
        "id": label,
        "format": format,
        "quant_label": label,
        "bits_per_weight": 4.5,
        "entry": entry,
        "files": listed,
        "weights": {"total": 3, "resident": 1, "experts": 2, "basis": "exact"},
        "quality": {
            "status": "pass",
            "reference": "the FP8 release",
            "corpus": {"sha256": "c" * 64},
            "metrics": {"ppl": 6.25, "kld": {"mean": 0.0125, "p999": 0.5}, "top1": 0.975, "nonfinite": 0},
        },
        "provenance": {"run": {"command": "gguf", "type": label, "calibration": {"sha256": "d" * 64}}},
    }
    licence = {"spdx_or_name": "other:x", "link": "", "commercial_use": "prohibited-without-authorization"}
    return {
        "schema": "mmquant-fit",
        "schema_version": "1.0",
        "generator": {"name": "mmquant", "version": "0.1.0"},
        "model": {
            **base,
            "architecture": "minimax_m2",
            "kv_bytes_per_token": {"f16": 1},
            "max_context_tokens": 1,
        },
        "license": {**licence, "notice": "Copyright (c) 2026 MiniMax"},
        "artifacts": [artifact],
        "targets": [target],
    }


def write(folder: Path, files: dict[str, bytes], manifest: dict[str, Any]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / "LICENSE").write_text(LICENSE)
    (folder / "mmquant.fit.json").write_text(json.dumps(manifest))
    return folder


def gguf_folder(folder: Path, label: str = "Q4_K_M", parts: int = 3) -> Path:
    names = [f"M2.7-{label}-{i:05d}-of-{parts:05d}.gguf" for i in range(1, parts + 1)]
    files = {n: label.encode() + bytes([i]) * (WEIGHTS + i) for i, n in enumerate(names)}
    return write(folder, files, manifest_of(label, "gguf", names[0], files))


def safetensors_folder(folder: Path, shards: int = 4, **model: str) -> Path:
    files = {f"model-{i:05d}-of-{shards:05d}.safetensors": bytes([i]) * WEIGHTS for i in range(1, shards + 1)}
    manifest = manifest_of("W4A16-g128", "compressed-tensors", ".", files, **model)
    others = {"config.json": b"{}", "tokenizer.json": b"t" * 90_000, ".mmquant.lock": b"", "x.tmp": b"?"}
    others |= {".mmquant.plan/plan.json": b"{}", ".mmquant.plan/sensitivity.json": b"{}"}
    return write(folder, {**files, **others}, manifest)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path)
        yield server


def publish(folder: Path, hub: str = "hf", revision: str | None = None, **more: Any) -> dict[str, Any]:
    names = {"request": "pr", "delete": "delete_after_upload"}
    dry_run = more.pop("dry_run", False)
    options = PushOptions(hub=hub, revision=revision, **{names.get(name, name): value for name, value in more.items()})
    with watching(Terminal()):
        return push_to(folder, remote_of(Client(endpoint_of(hub), QUICK), "me/q", revision), options, dry_run=dry_run)


def files_of(server: HubServer, repo: str = "me/q", revision: str = "main") -> dict[str, bytes]:
    tree = server.tree(repo, revision)
    return {p: bytes(server.objects[e.sha256][:]) for p, e in tree.items() if p != ".gitattributes"}


def check_sums(files: dict[str, bytes]) -> None:
    lines = [line.split("  ") for line in files["SHA256SUMS"].decode().splitlines()]
    sums = {path: digest for digest, path in lines}
    assert sums == {p: hashlib.sha256(d).hexdigest() for p, d in files.items() if p not in ("README.md", "SHA256SUMS")}


def front(files: dict[str, bytes]) -> dict[str, Any]:
    return yaml.safe_load(files["README.md"].decode().split("---")[1])


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_a_folder_arrives_whole_with_the_card_in_the_last_commit(hub: HubServer, tmp_path: Path, source: str) -> None:
    folder = safetensors_folder(tmp_path / "o")
    done = publish(folder, source)
    files = files_of(hub)
    local = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.name.startswith((".", "x."))}
    assert {p: files[p] for p in local if p != "mmquant.fit.json"} == {
        p: d for p, d in local.items() if p != "mmquant.fit.json"
    }
    assert set(files) == {*local, "FIT.md", "mmquant.report.html"}
    check_sums(files)
    history = hub.repos["me/q"].history()
    assert done["commits"] == len(history) - 1 == 1
    assert all({"README.md", "mmquant.fit.json"} <= c.tree.keys() for c in history[:1])
    manifest = json.loads(files["mmquant.fit.json"])
    assert manifest["targets"][0]["launch"]["argv"] == ["vllm", "serve", "me/q"]
    assert manifest["artifacts"][0]["repo"] == {{"hf": "huggingface", "ms": "modelscope"}[source]: "me/q"}


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_a_second_push_moves_and_commits_nothing(hub: HubServer, tmp_path: Path, source: str) -> None:
    folder = safetensors_folder(tmp_path / "o")
    publish(folder, source)
    hub.log.clear()
    assert publish(folder, source)["commits"] == 0
    for ledger in folder.glob(".mmquant-push.*"):
        ledger.unlink()
    assert publish(folder, source)["commits"] == 0
    assert hub.calls("PUT ") == hub.calls("POST .*/commit/") == []


def test_weights_go_first_and_in_few_commits(hub: HubServer, tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path / "o", shards=60)
    assert publish(folder)["commits"] == 2
    last, first, _ = hub.repos["me/q"].history()
    assert all(p.endswith(".safetensors") or p == ".gitattributes" for p in first.tree)
    assert len(first.tree) - 1 == 50
    assert {"README.md", "SHA256SUMS", "mmquant.fit.json", "LICENSE"} <= last.tree.keys()


def test_modelscope_gets_license_other_and_its_master_branch(hub: HubServer, tmp_path: Path) -> None:
    publish(safetensors_folder(tmp_path / "o"), "ms", private=True)
    assert hub.repos["me/q"].license == "other"
    assert hub.repos["me/q"].private
    assert hub.calls("POST /api/v1/repos/models/me/q/commit/master")
    assert not hub.calls("part=")


def test_a_private_repository_and_a_branch(hub: HubServer, tmp_path: Path) -> None:
    publish(safetensors_folder(tmp_path / "o"), private=True, revision="v2")
    assert hub.repos["me/q"].private
    assert "README.md" in hub.tree("me/q", "v2")
    assert "README.md" not in hub.tree("me/q", "main")


def test_a_pull_request_is_continued_not_doubled(hub: HubServer, tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path / "o")
    publish(folder, request=True)
    assert publish(folder, request=True)["commits"] == 0
    assert hub.repos["me/q"].pull_requests == 1
    assert "README.md" in hub.tree("me/q", "refs/pr/1")
    assert "README.md" not in hub.tree("me/q")
    with pytest.raises(ValueError, match="ModelScope's API has no pull requests"):
        publish(folder, "ms", request=True)


@pytest.mark.parametrize("source", ["hf", "ms"])
@pytest.mark.parametrize("fault", [{"lost": True}, {"status": 503}, {"status": 429, "headers": {"Retry-After": "1"}}])
def test_a_commit_without_an_answer_is_not_made_twice(
    hub: HubServer, tmp_path: Path, source: str, fault: dict[str, Any]
) -> None:
    hub.fault("POST .*/commit/", **fault)
    publish(safetensors_folder(tmp_path / "o"), source)
    assert len(hub.repos["me/q"].history()) == 2
    check_sums(files_of(hub))


UPLOAD_FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("hf", {"status": 500}),
    ("hf", {"lost": True}),
    ("ms", {"status": 500}),
    ("ms", {"lost": True}),
    ("ms", {"status": 403}),  # an expired address; huggingface_hub takes it for final
]


@pytest.mark.parametrize("source, fault", UPLOAD_FAULTS)
def test_an_upload_that_fails_is_tried_again(
    hub: HubServer, tmp_path: Path, source: str, fault: dict[str, Any]
) -> None:
    hub.fault("PUT /s3/", **fault)
    publish(safetensors_folder(tmp_path / "o"), source)
    check_sums(files_of(hub))


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_the_token_goes_to_the_hub_alone(
    hub: HubServer, tmp_path: Path, source: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = safetensors_folder(tmp_path / "o")
    publish(folder, source)
    assert hub.calls("PUT /s3/")
    assert not any(c["secret"] for c in hub.calls(".") if c["cdn"])
    hub.faults.clear()
    hub.fault("POST .*/commit/", status=401, times=99)
    (folder / "config.json").write_text("{ }")
    with pytest.raises(HubError) as caught:
        publish(folder, source)
    texts = str(caught.value) + "".join(capfd.readouterr())
    texts += "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())
    assert TOKEN not in texts
    assert "no write access (HTTP 401)" in texts or "no access (HTTP 401)" in texts


def test_the_token_may_go_to_the_hubs_own_subdomains_only() -> None:
    hub = "https://www.modelscope.cn"
    assert same_site("https://lfs.modelscope.cn/x", hub)
    for url in ("http://lfs.modelscope.cn/x", "https://evilmodelscope.cn/x", "https://modelscope.cn.evil.org/x"):
        assert not same_site(url, hub)
    assert not same_site("https://x.localhost/", "https://localhost")


def test_without_a_token_it_says_what_to_set(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match=r"no write access .* set HF_TOKEN"):
        publish(safetensors_folder(tmp_path / "o"))


# -- licence and card ------------------------------------------------------------------------------------------------


def test_the_base_cards_licence_fields_are_kept_verbatim_at_the_pinned_revision(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.seed("MiniMaxAI/MiniMax-M2.7", {"README.md": BASE_CARD.encode()})
    hub.seed("MiniMaxAI/MiniMax-M2.7", {"README.md": b"---\nlicense: mit\n---\n"})
    publish(safetensors_folder(tmp_path / "o", source="huggingface", base_revision=commit))
    found = front(files_of(hub))
    assert [found[k] for k in ("license", "license_name", "license_link")] == [
        "other",
        "modified-mit",
        "https://example.org/LICENSE",
    ]
    assert (found["base_model"], found["base_model_relation"]) == ("MiniMaxAI/MiniMax-M2.7", "quantized")


def test_a_nameless_other_licence_gets_its_name(hub: HubServer, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: other\n---\n")
    publish(safetensors_folder(tmp_path / "o"), base_card=card)
    assert front(files_of(hub))["license_name"] == "minimax-m2.7-non-commercial"


def test_publishing_is_refused_without_the_licence_or_with_mit(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = safetensors_folder(tmp_path / "o")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    with pytest.raises(ValueError, match=r"README.md: license: mit"):
        publish(folder)
    (folder / "README.md").unlink()
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: MIT\n---\n")
    with pytest.raises(ValueError, match="base model's card: license: mit"):
        publish(folder, base_card=card)
    (folder / "LICENSE").unlink()
    with pytest.raises(ValueError, match="no licence file"):
        publish(folder)
    assert not hub.calls("PUT |/commit/")
    assert "forbids commercial use" in capsys.readouterr().err


MIT = "MIT License\n\nCopyright (c) 2025 MiniMax\n\nPermission is hereby granted, free of charge, to any person\n"
OWN = "---\nbase_model: MiniMaxAI/MiniMax-M2.7\nlicense: other\nlicense_name: minimax-model-license\nlanguage: [en]\n"
OWN += "license_link: https://example.org/LICENSE\nbase_model_relation: finetune\nlibrary_name: mine\n---\n# my text\n"


def test_the_owners_card_is_kept(hub: HubServer, tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path / "o", base_model="m27 local", base_revision="0" * 40)
    (folder / "README.md").write_text(OWN)
    publish(folder)
    found = front(files_of(hub))
    mine = yaml.safe_load(OWN.split("---")[1])
    assert {key: found[key] for key in mine} == mine
    assert yaml.safe_load((folder / "README.md").read_text().split("---")[1]) == found
    text = files_of(hub)["README.md"].decode()
    assert "# my text" in text
    assert "m27 local" not in text + files_of(hub)["mmquant.fit.json"].decode()
    publish(folder, base_model="org/other", license="apache-2.0-like")
    changed = front(files_of(hub))
    assert (changed["base_model"], changed["license"], changed["license_name"]) == (
        "org/other",
        "other",
        "apache-2.0-like",
    )


def test_a_folders_name_is_no_base_model(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = safetensors_folder(tmp_path / "o", base_model="m27", base_revision="0" * 40)
    publish(folder)
    assert not {"base_model", "base_model_relation"} & front(files_of(hub)).keys()
    assert json.loads(files_of(hub)["mmquant.fit.json"])["model"]["base_model"] == "unknown"
    assert "the card names none (--base-model ORG/NAME)" in capsys.readouterr().err
    publish(folder, base_model="org/m")
    assert front(files_of(hub))["base_model"] == "org/m"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("---\nbase_model: m27 local\n---\n", {}, "README.md: base_model 'm27 local', expected ORG/NAME"),
    ("---\nbase_model: [a/b, c]\n---\n", {}, "README.md: base_model 'c', expected ORG/NAME"),
    ("---\nlicense: apache-2.0\n---\n", {}, "README.md: license: apache-2.0, but the licence file forbids commercial"),
    ("", {"license": "MIT"}, "--license: license: mit, but the licence file forbids commercial use"),
    ("---\nlanguage: 7\n---\n", {}, 'the hub refuses its front matter: "language" must be an array'),
]


@pytest.mark.parametrize("text, options, words", REFUSED)
def test_a_card_is_refused_before_the_first_byte(
    hub: HubServer, tmp_path: Path, text: str, options: dict[str, Any], words: str
) -> None:
    folder = safetensors_folder(tmp_path / "o")
    (folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        publish(folder, **options)
    assert not hub.repos
    assert not hub.calls("PUT |preupload|/commit/")
    assert (folder / "README.md").read_text() == text
    if "the hub" not in words:
        with pytest.raises(ValueError, match=re.escape(words)):
            publish(folder, dry_run=True, **options)


@pytest.mark.parametrize("status", [404, 500])
def test_a_hub_that_checks_no_cards_gets_the_folder(hub: HubServer, tmp_path: Path, status: int) -> None:
    hub.fault("POST /api/validate-yaml", status=status, times=9 if status == 500 else 1)
    if status == 500:  # huggingface_hub asks again by itself when it commits
        hub.faults[-1].times = QUICK.attempts + 1
    publish(safetensors_folder(tmp_path / "o"))
    check_sums(files_of(hub))


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: mit\nlicense_name: modified-mit\n---\n", {"license": "mit", "license_name": "modified-mit"}),
        ("---\nlicense: other\n---\n", {"license": "other", "license_name": "see-license-file"}),
        (None, {"license": "mit"}),
    ],
)
def test_a_base_under_mit_is_published_under_mit(
    hub: HubServer, tmp_path: Path, card: str | None, expected: dict[str, str]
) -> None:
    folder = safetensors_folder(tmp_path / "o")
    (folder / "LICENSE").write_text(MIT)
    path = tmp_path / "card.md"
    path.write_text(card or "")
    publish(folder, base_card=path if card else None)
    found = front(files_of(hub))
    assert {key: found.get(key) for key in ("license", "license_name") if key in found} == expected


def test_the_users_text_around_the_generated_part_is_kept(hub: HubServer, tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path / "o")
    (folder / "README.md").write_text("---\nlanguage: [en, zh]\ntags: [mine]\n---\nBefore.\n")
    publish(folder)
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nAfter.\n")
    publish(folder)
    files = files_of(hub)
    text = files["README.md"].decode()
    assert re.fullmatch(rf"---\n.*\n---\nBefore\.\n\n{re.escape(BEGIN)}\n.*\n{re.escape(END)}\n\nAfter\.\n", text, re.S)
    assert text.count(BEGIN) == text.count("## Quality") == 1
    assert front(files)["language"] == ["en", "zh"]
    assert front(files)["tags"][0] == "mine"
    for word in ("6.25", "0.0125", "0.975", "c" * 16, "FIT.md", REVISION, "commercial use", "vllm serve me/q"):
        assert word.lower() in text.lower()


def test_a_card_without_a_local_copy_keeps_the_hubs_text(hub: HubServer, tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path / "o")
    publish(folder)
    text = files_of(hub)["README.md"].decode() + "Said on the hub.\n"
    hub.seed("me/q", {"README.md": text.encode()})
    (folder / "README.md").unlink()
    publish(folder)
    assert files_of(hub)["README.md"].decode() == text


# -- layout ----------------------------------------------------------------------------------------------------------


def llama_cpp_finds(paths: list[str], tag: str) -> list[str]:
    """The documented rule of `llama-server -hf REPO:TAG` (llama.cpp 0c1e57098, common/download), written anew: the tag
    as a case-insensitive regular expression followed by `.` or `-` anywhere in the path, in the order of the tree, of
    files that end in .gguf and are no mmproj, imatrix and the like; of a split set all parts, found by its first one.
    """
    skip = re.compile("mmproj|imatrix|mtp-|eagle3-|dflash-|dspark-")
    for path in sorted(paths):
        if path.endswith(".gguf") and not skip.search(path.split("/")[-1]) and re.search(tag + r"[.-]", path, re.I):
            split = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path)
            if not split:
                return [path]
            part = re.compile(re.escape(split[1]) + r"-\d{5}-of-" + split[3] + r"\.gguf")
            return [p for p in sorted(paths) if part.fullmatch(p)]
    return []


def test_every_quantization_is_found_by_llama_cpps_rule(hub: HubServer, tmp_path: Path) -> None:
    for label, parts in (("Q4_K_M", 3), ("UD-IQ3_XXS", 1), ("IQ4_XS", 2)):
        if parts > 1:
            folder = gguf_folder(tmp_path / label, label, parts)
        else:
            name = f"M2.7-{label}.gguf"
            data = {name: b"q" * WEIGHTS}
            folder = write(tmp_path / label, data, manifest_of(label, "gguf", name, data))
        (folder / "imatrix.gguf").write_bytes(b"i" * 1000)
        publish(folder)
    files = files_of(hub)
    assert len(llama_cpp_finds(list(files), "Q4_K_M")) == 3
    assert llama_cpp_finds(list(files), "UD-IQ3_XXS") == ["UD-IQ3_XXS/M2.7-UD-IQ3_XXS.gguf"]
    assert len(llama_cpp_finds(list(files), "IQ4_XS")) == 2
    assert "imatrix.gguf" in files
    assert "preset.ini" not in files
    manifest = json.loads(files["mmquant.fit.json"])
    assert [a["id"] for a in manifest["artifacts"]] == ["Q4_K_M", "UD-IQ3_XXS", "IQ4_XS"]
    for target, artifact in zip(manifest["targets"], manifest["artifacts"], strict=True):
        command = target["launch"]["argv"]
        repo, tag = command[command.index("-hf") + 1].split(":")
        assert (repo, llama_cpp_finds(list(files), tag)[0]) == ("me/q", artifact["entry"])
        assert f"{repo}:{tag}" in files["README.md"].decode()
    check_sums(files)
    assert "llama-gguf-split --merge" in files["README.md"].decode()


def test_artifacts_of_another_base_are_not_mixed(hub: HubServer, tmp_path: Path) -> None:
    publish(gguf_folder(tmp_path / "a"))
    other = gguf_folder(tmp_path / "b", "Q8_0")
    manifest = json.loads((other / "mmquant.fit.json").read_text())
    manifest["model"]["base_revision"] = "2" * 40
    (other / "mmquant.fit.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"base_revision {REVISION}, expected {'2' * 40}"):
        publish(other)
    with pytest.raises(ValueError, match="fills a repository of its own"):
        publish(safetensors_folder(tmp_path / "c"))


BAD_LAYOUTS: list[tuple[dict[str, int], str]] = [
    ({"preset.ini": 1}, "preset.ini"),
    ({"Q4_K_M/M-Q4_K_M.gguf": 48_000_000_001}, "expected parts of at most 48,000,000,000"),
    ({"Q4_K_M/M-imatrix-Q4_K_M.gguf": 1}, "'imatrix'"),
    ({"Q4_K_M/mmproj-Q4_K_M.gguf": 1}, "'mmproj'"),
    ({"Q4_K_M/M-Q4_K_M-00001-of-00002.gguf": 1}, "00002-of-00002.gguf is missing"),
    ({"IQ4_XS/M-Q4_K_M.gguf": 1}, "expected a folder Q4_K_M"),
    ({"Q4_K_M/model.gguf": 1}, "no quantization"),
    ({"A-Q4_K_M-old/Q8_0/M-Q8_0.gguf": 1, "Q4_K_M/M-Q4_K_M.gguf": 1}, "finds A-Q4_K_M-old"),
    ({"Q4_K_M/A-Q4_K_M.gguf": 1, "Q4_K_M/B-Q4_K_M.gguf": 1}, "one file set a quantization"),
    ({"Q4_K_M/M-Q4_K_M.gguf": 1} | {f"f{i}": 1 for i in range(1000)}, "1000 entries at most"),
]


@pytest.mark.parametrize("files, text", BAD_LAYOUTS)
def test_layouts_that_clients_cannot_read_are_refused(files: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        check_layout(files)


@pytest.mark.parametrize("tag", ["Q4_K_M", "q4_k_m", "Q4_K_XL", "IQ2_M", "Q9", "UD-Q4_K_M"])
def test_our_lookup_is_the_documented_one(tag: str) -> None:
    paths = ["Q4_K_M/M-Q4_K_M-00001-of-00002.gguf", "Q4_K_M/M-Q4_K_M-00002-of-00002.gguf", "M-IQ2_M.gguf"]
    paths += ["UD-Q4_K_XL/M-UD-Q4_K_XL.gguf", "imatrix.gguf", "UD-Q4_K_M/M-UD-Q4_K_M.gguf", "Q9/Q9-imatrix.gguf"]
    assert [find_by_tag(paths, tag)] == (llama_cpp_finds(paths, tag)[:1] or [None])


def change(folder: Path) -> None:
    (folder / "model-00002-of-00004.safetensors").write_bytes(b"!" * WEIGHTS)


def truncate(folder: Path) -> None:
    (folder / "model-00002-of-00004.safetensors").write_bytes(b"!" * 10)


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (change, "SHA-256 .* the manifest says"),
    (truncate, "10 bytes, the manifest says 120,000"),
    (lambda f: (f / "model-00002-of-00004.safetensors").unlink(), "is missing, the manifest lists it"),
    (lambda f: (f / "mmquant.fit.json").unlink(), "expected a finished artifact"),
    (lambda f: (f / "mmquant.fit.json").write_text("{}"), "mmquant.fit.json"),
    (lambda f: (f / ".mmquant-push.hf.me--q.json").write_text("{"), "not a ledger"),
    (lambda f: (f / "README.md").write_text("---\n[\n---\n"), "front matter is not YAML"),
    (lambda f: (f / "README.md").write_text("---\nx: " + "[" * 5000 + "\n---\n"), "nested too deeply"),
    (lambda f: (f / "LICENSE").write_text(" \n"), "LICENSE: empty, expected the base model's licence"),
    (lambda f: (f / "a\nb.txt").write_text(""), "control characters"),
    (lambda f: (f / "a\\b.txt").write_text(""), "a backslash or a colon"),
    (lambda f: (f / "README.md").write_text(BEGIN), "is missing after the generated part"),
]


@pytest.mark.parametrize("breaking, text", BROKEN)
def test_a_broken_folder_is_refused_before_anything_is_committed(
    hub: HubServer, tmp_path: Path, breaking: Callable[[Path], Any], text: str
) -> None:
    folder = safetensors_folder(tmp_path / "o")
    breaking(folder)
    with pytest.raises(ValueError, match=text):
        publish(folder)
    assert not hub.calls("PUT |/commit/")


# -- disk, crashes, processes ----------------------------------------------------------------------------------------


def test_weights_are_deleted_after_their_commit_and_the_sums_still_name_them(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmquant.convert.hub.push.BATCH_BYTES", 2 * WEIGHTS)
    folder = safetensors_folder(tmp_path / "o", shards=5)
    assert publish(folder, delete=True)["commits"] == 3
    assert not list(folder.glob("*.safetensors"))
    files = files_of(hub)
    assert len([p for p in files if p.endswith(".safetensors")]) == 5
    check_sums(files)
    assert publish(folder, delete=True)["commits"] == 0
    assert files_of(hub) == files


def command(folder: Path, hub: str, *more: str) -> list[str]:
    return ["push", str(folder), "--hub", hub, "--repo", "me/q", *more]


@pytest.mark.parametrize("source", ["hf", "ms"])
def test_killed_pushes_end_with_the_same_content_and_no_double_commit(tmp_path: Path, source: str) -> None:
    folder = safetensors_folder(tmp_path / "o", shards=6)
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(), "HOME": str(tmp_path)}
        for held, after in (("PUT /s3/", 2), ("POST .*/commit/", 0)):
            hub.hold(held, after)
            process = subprocess.Popen(
                [sys.executable, "-m", "mmquant", *command(folder, source)], env=environment, stderr=subprocess.PIPE
            )
            until(process, lambda: hub.held > 0)
            kill(process)
            hub.let_go()  # what was under way is still made
        done = mmquant(*command(folder, source, "--json"), env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["commits"] <= 1
        assert len(hub.repos["me/q"].history()) == 2
        check_sums(files_of(hub))
        assert TOKEN not in done.stdout + done.stderr


def test_a_folder_in_use_names_its_holder(hub: HubServer, tmp_path: Path) -> None:
    from mmquant.convert.files.lock import hold

    folder = safetensors_folder(tmp_path / "o")
    with hold(folder):
        done = mmquant(*command(folder, "hf"))
    assert done.returncode == 2
    assert f"in use by process {os.getpid()} on " in done.stderr
    assert len(done.stderr.splitlines()) == 1


CALLS = {
    "hf": [
        "POST /api/repos/create",
        "POST .*/preupload/",
        "POST .*/objects/batch",
        "POST .*/commit/",
        "POST /api/validate",
    ],
    "ms": ["POST /api/v1/models", "POST .*/objects/batch", "POST .*/commit/"],
}
ANSWERS = [
    b"",
    b"null",
    b"[]",
    b"{",
    b'{"a": 1}',
    b'{"Data": 5}',
    b'{"files": [null], "objects": [null], "commitUrl": {}}',
]


@pytest.mark.parametrize("source, call", [(source, call) for source, calls in CALLS.items() for call in calls])
def test_answers_of_another_form_are_one_line(hub: HubServer, tmp_path: Path, source: str, call: str) -> None:
    """Our own reading and that of the hub's client: nothing is a traceback, and nothing counts as published unseen."""
    folder = safetensors_folder(tmp_path / "o")
    for answer in ANSWERS:
        hub.faults.clear()
        hub.fault(call, times=1 << 20, body=answer)
        with contextlib.suppress(MmquantError, TransferError):
            publish(folder, source)
            name = "model-00001-of-00004.safetensors"
            assert files_of(hub)[name] == (folder / name).read_bytes()
