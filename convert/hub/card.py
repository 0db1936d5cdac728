"""Generate the model card from the manifest, between markers; the owner's text stays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmquant.errors import InputError

from ..card import LICENSE_FIELDS
from ..files.parse import is_list
from ..manifest_check import read_checked
from .card_text import generated
from .hubs import BY_MANIFEST_NAME, HUBS
from .layout import quant_label

MANIFEST = "mmquant.fit.json"
BEGIN = "<!-- mmquant: generated from mmquant.fit.json up to the end mark, edit outside -->"
END = "<!-- mmquant: end -->"
LOCAL_REVISION = "0" * 40  # of a base that was read from a folder
UNKNOWN_BASE = "unknown"  # as convert.manifest has it, without its torch


@dataclass(frozen=True)
class Place:
    """Where a card is shown."""

    hub: str
    repo: str


def read_manifest(folder: Path) -> dict[str, Any]:
    """A finished artifact's manifest, checked; as convert.manifest.read, without its torch."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: {MANIFEST} is missing, expected a finished artifact of mmquant")
    return read_checked(path)


def published(manifest: dict[str, Any], place: Place, moved: Mapping[str, str]) -> dict[str, Any]:
    """The manifest as it stands in a repository: paths of the repository, commands that fetch from it."""
    data = json.loads(json.dumps(manifest))
    artifacts = {a["id"]: a for a in data["artifacts"]}
    labels = [a["quant_label"] for a in artifacts.values() if "quant_label" in a]
    for target in data["targets"]:
        artifact = artifacts.get(target["artifact"])
        if artifact is None:
            continue
        for launch in [target["launch"], *target.get("alternatives", [])]:
            launch |= _launch(launch, artifact, place, labels, moved)
    for artifact in artifacts.values():
        if artifact["format"] == "gguf":
            artifact["quant_label"] = quant_label(artifact["entry"], labels)
        artifact["entry"] = moved.get(artifact["entry"], artifact["entry"])
        for file in artifact["files"]:
            file["path"] = moved.get(file["path"], file["path"])
        artifact["repo"] = {**artifact.get("repo", {}), HUBS[place.hub].manifest_name: place.repo}
    return data


def _launch(
    launch: Mapping[str, Any], artifact: Mapping[str, Any], place: Place, labels: list[str], moved: Mapping[str, str]
) -> dict[str, Any]:
    """The command with the repository's name where the local path stood; scripts go on from the downloaded file."""
    argv, environment, entry = list(launch["argv"]), dict(launch.get("env", {})), artifact["entry"]
    for at, word in enumerate(argv):
        if word == entry and at and argv[at - 1] in ("-m", "--model") and artifact["format"] == "gguf":
            argv[at - 1 : at + 1] = ["-hf", f"{place.repo}:{quant_label(entry, labels)}"]
            environment |= HUBS[place.hub].llamacpp_environment
        elif word == entry:
            argv[at] = place.repo
            hub = HUBS[place.hub]
            environment |= hub.mlx_environment if artifact["format"] == "mlx" else hub.vllm_environment
        elif argv[:2] == ["sh", "-c"] and at == 2 and artifact["format"] == "gguf":
            argv[at] = word.replace(entry, moved.get(entry, entry))
    return {"argv": argv, "env": environment}


def merge(ours: dict[str, Any], remote: dict[str, Any] | None) -> dict[str, Any]:
    """Our artifacts with those that the repository has already. ValueError when they are of another base model."""
    if remote is None:
        return ours
    own = {a["id"] for a in ours["artifacts"]}
    others = [a for a in remote["artifacts"] if a["id"] not in own]
    for key in ("base_model", "base_revision") if others else ():
        if remote["model"].get(key) != ours["model"].get(key):
            found, expected = remote["model"].get(key), ours["model"].get(key)
            raise InputError(f"the repository's {MANIFEST}: {key} {found}, expected {expected}; use another repository")
    if clash := [a["id"] for a in [*others, *ours["artifacts"]] if a["entry"] == "." and others]:
        raise InputError(f"the repository holds {others[0]['id']}: {clash[0]} fills a repository of its own")
    targets = [t for t in remote["targets"] if t["artifact"] not in own]
    return {**ours, "artifacts": [*others, *ours["artifacts"]], "targets": [*targets, *ours["targets"]]}


def front_matter(
    old: Mapping[str, Any], manifest: dict[str, Any], base: list[str], licence: Mapping[str, Any]
) -> dict[str, Any]:
    """The owner's front matter with what it lacks: licence, base model, library, tags. `base`: ORG/NAME, maybe none."""
    formats = {a["format"] for a in manifest["artifacts"]}
    front = {key: value for key, value in old.items() if key not in ("base_model", *LICENSE_FIELDS)} | dict(licence)
    if base:
        front["base_model"] = base[0] if len(base) == 1 else base
        front.setdefault("base_model_relation", "quantized")
    else:
        front.pop("base_model_relation", None)
    front.setdefault("library_name", next(iter(formats)) if formats in ({"gguf"}, {"mlx"}) else "vllm")
    front.setdefault("pipeline_tag", "text-generation")
    tags: object = front.get("tags") or []
    tags = tags if is_list(tags) else [tags]
    front["tags"] = list(dict.fromkeys([*tags, "mmquant", manifest["model"]["architecture"], *sorted(formats)]))
    order = [k for k in (*LICENSE_FIELDS, "base_model", "base_model_relation") if k in front]
    return {k: front[k] for k in order} | front


def card(manifest: dict[str, Any], place: Place, front: Mapping[str, Any], body: str, notice: str) -> str:
    """A whole README.md: front matter, and our part inside the owner's text."""
    part = f"{BEGIN}\n{generated(manifest, place.hub, place.repo, notice)}\n{END}"
    head, mark, rest = body.partition(BEGIN)
    if mark:
        if END not in rest:
            raise InputError(f"README.md: the mark {END!r} is missing after the generated part")
        body = head + part + rest.partition(END)[2]
    else:
        body = (body.rstrip() + "\n\n" if body.strip() else "") + part + "\n"
    yaml_text = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{yaml_text}---\n{body}"


def base_spec(model: Mapping[str, Any]) -> str | None:
    """hf:ORG/NAME@REV of a manifest's model; None when it came from a folder."""
    hub = BY_MANIFEST_NAME.get(model.get("source", ""))
    return f"{hub.key}:{model['base_model']}@{model['base_revision']}" if hub else None
