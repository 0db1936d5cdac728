"""Generate the model card from the manifest, between markers; the owner's text stays."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmquant.errors import InputError
from mmquant.tables import Size, cell, markdown

from ..card import LICENSE_FIELDS
from ..files.parse import is_list, is_object
from ..manifest_check import read_checked
from .hubs import BY_MANIFEST_NAME, HUBS
from .layout import quant_label, split_of

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
        if artifact is not None:
            target["launch"] = _launch(target, artifact, place, labels)
    for artifact in artifacts.values():
        if artifact["format"] == "gguf":
            artifact["quant_label"] = quant_label(artifact["entry"], labels)
        artifact["entry"] = moved.get(artifact["entry"], artifact["entry"])
        for file in artifact["files"]:
            file["path"] = moved.get(file["path"], file["path"])
        artifact["repo"] = {**artifact.get("repo", {}), HUBS[place.hub].manifest_name: place.repo}
    return data


def _launch(target: dict[str, Any], artifact: dict[str, Any], place: Place, labels: list[str]) -> dict[str, Any]:
    """The command with the repository's name where the local path stood."""
    launch = target["launch"]
    argv, environment = list(launch["argv"]), dict(launch.get("env", {}))
    for at, word in enumerate(argv):
        if word == artifact["entry"] and at and argv[at - 1] in ("-m", "--model") and artifact["format"] == "gguf":
            argv[at - 1 : at + 1] = ["-hf", f"{place.repo}:{quant_label(artifact['entry'], labels)}"]
            environment |= HUBS[place.hub].llamacpp_environment
        elif word == artifact["entry"]:
            argv[at] = place.repo
            environment |= HUBS[place.hub].vllm_environment
    return {**launch, "argv": argv, "env": environment}


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
    front.setdefault("library_name", "gguf" if formats == {"gguf"} else "vllm")
    front.setdefault("pipeline_tag", "text-generation")
    tags: object = front.get("tags") or []
    tags = tags if is_list(tags) else [tags]
    front["tags"] = list(dict.fromkeys([*tags, "mmquant", manifest["model"]["architecture"], *sorted(formats)]))
    order = [k for k in (*LICENSE_FIELDS, "base_model", "base_model_relation") if k in front]
    return {k: front[k] for k in order} | front


def card(manifest: dict[str, Any], place: Place, front: Mapping[str, Any], body: str, notice: str) -> str:
    """A whole README.md: front matter, and our part inside the owner's text."""
    part = f"{BEGIN}\n{_generated(manifest, place, notice)}\n{END}"
    head, mark, rest = body.partition(BEGIN)
    if mark:
        if END not in rest:
            raise InputError(f"README.md: the mark {END!r} is missing after the generated part")
        body = head + part + rest.partition(END)[2]
    else:
        body = (body.rstrip() + "\n\n" if body.strip() else "") + part + "\n"
    yaml_text = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{yaml_text}---\n{body}"


def _generated(manifest: dict[str, Any], place: Place, notice: str) -> str:
    name = place.repo.split("/")[1]
    parts = [
        f"# {name}",
        _license(manifest, notice),
        "## Pick a file",
        _targets(manifest),
        "## Files",
        _files(manifest),
    ]
    parts += ["## Quality", _quality(manifest), "## How it was made", _made(manifest)]
    known = [k for a in manifest["artifacts"] for k in a.get("requires", {}).get("known_bad", [])]
    if known := list(dict.fromkeys([*known, *_splits(manifest)])):
        parts += ["## Known issues", "\n".join(f"- {k}" for k in known)]
    download = HUBS[place.hub].download
    parts += ["## Check", f"```\n{download} {place.repo} --local-dir {name}\ncd {name} && sha256sum -c SHA256SUMS\n```"]
    return "\n\n".join(p for p in parts if p)


def _license(manifest: dict[str, Any], notice: str) -> str:
    model, licence = manifest["model"], manifest["license"]
    source = "a local checkpoint" if model["base_model"] == UNKNOWN_BASE else f"`{model['base_model']}`"
    if model["base_revision"] != LOCAL_REVISION:
        source += f" at revision `{model['base_revision']}`"
    lines = [f"> Quantized from {source}. Licence: see [LICENSE](LICENSE)."]
    if licence["commercial_use"] == "prohibited-without-authorization":
        lines.append("> **Commercial use, of the model or of any derivative such as this one, needs prior written")
        lines.append("> authorization from MiniMax.** Built with MiniMax M2.7.")
    return "\n".join([*lines, *([f"> {notice.split('. ')[0]}"] if notice else [])])


def _targets(manifest: dict[str, Any]) -> str:
    rows: list[list[str]] = []
    for t in manifest["targets"]:
        environment = "".join(f"{k}={shlex.quote(v)} " for k, v in sorted(t["launch"].get("env", {}).items()))
        command = environment + shlex.join(t["launch"]["argv"])
        fits = t["fits"] != "no"
        context = f"{t['context_tokens']:,}" if fits else "-"
        rows.append(
            [t["id"], t["artifact"], t["engine"], t["fits"], context, t["basis"], f"`{command}`" if fits else "-"]
        )
    head = ["for", "artifact", "engine", "fits", "context", "basis", "command"]
    return markdown(head, rows) if rows else "No targets were computed."


def _files(manifest: dict[str, Any]) -> str:
    rows = [
        [f"`{f['path']}`", a.get("quant_label", a["id"]), Size(f["size"]), f"`{f['sha256']}`"]
        for a in manifest["artifacts"]
        for f in a["files"]
    ]
    return markdown(["file", "artifact", "GB", "sha256"], rows)


def _quality(manifest: dict[str, Any]) -> str:
    rows: list[list[str]] = []
    notes: list[str] = []
    for a in manifest["artifacts"]:
        quality = a.get("quality", {"status": "not-measured"})
        metrics, bits = quality.get("metrics", {}), a.get("bits_per_weight")
        kld: dict[str, object] = metrics["kld"] if is_object(metrics.get("kld")) else {}
        numbers: list[object] = [
            metrics.get("ppl"),
            metrics.get("ppl_reference"),
            kld.get("mean"),
            kld.get("p999"),
            metrics.get("top1"),
        ]
        cells = [_number(n) for n in (*numbers, metrics.get("nonfinite"))]
        rows.append([a["id"], _number(bits), quality["status"], *cells])
        corpus = json.dumps(quality.get("corpus"), sort_keys=True) if quality.get("corpus") else ""
        if quality.get("reference") or corpus:
            notes.append(
                f"{a['id']}: against {quality.get('reference', 'no reference')}; text {corpus or 'not recorded'}"
            )
    head = ["artifact", "bits/weight", "status", "PPL", "PPL of the reference", "mean KLD", "99.9 % KLD", "top-1"]
    return "\n\n".join([markdown([*head, "non-finite"], rows), *notes])


def _number(value: object) -> str:
    """A manifest's number; another tool's may be anything."""
    return cell(value if isinstance(value, int | float | str) else None)


def _made(manifest: dict[str, Any]) -> str:
    generator = manifest.get("generator", {})
    lines = [f"{generator.get('name', 'mmquant')} {generator.get('version', '')}".strip() + "."]
    source = base_spec(manifest["model"]) or "MODEL"
    for a in manifest["artifacts"]:
        run = dict(a.get("provenance", {}).get("run", {}))
        lines.append(_command(run, source, a["id"]))
        others = {k: v for k, v in a.get("provenance", {}).items() if k != "run"} | ({"run": run} if run else {})
        if others:
            lines.append(f"```json\n{json.dumps(others, indent=1, sort_keys=True, ensure_ascii=False)}\n```")
    return "\n\n".join(lines)


def _command(run: dict[str, Any], source: str, name: str) -> str:
    """The command that made an artifact; what it says is taken out of `run`."""
    command = str(run.pop("command", ""))
    if not command:
        return f"{name}: no command is recorded; it was written by a library."
    words = [command, "--model", source, "--out", name]
    for key in ("scheme", "method", "type"):
        if isinstance(run.get(key), str):
            words += [f"--{key}", run.pop(key)]
    if isinstance(run.get("experts"), int):  # of each layer so many stay; the file lies in the folder
        del run["experts"]
        words += ["--experts-kept", "experts_kept.json"]
    return f"{name}:\n\n```\nmmquant {shlex.join(words)}\n```"


def base_spec(model: Mapping[str, Any]) -> str | None:
    """hf:ORG/NAME@REV of a manifest's model; None when it came from a folder."""
    hub = BY_MANIFEST_NAME.get(model.get("source", ""))
    return f"{hub.key}:{model['base_model']}@{model['base_revision']}" if hub else None


def _splits(manifest: dict[str, Any]) -> list[str]:
    """Ollama takes no split GGUF: how to merge one."""
    entries = [a["entry"] for a in manifest["artifacts"] if a["format"] == "gguf" and split_of(a["entry"])[2] > 1]
    merged = [(e, split_of(e)[0]) for e in entries]
    return [f"Ollama loads no split GGUF; merge first: `llama-gguf-split --merge {e} {n}.gguf`" for e, n in merged]
