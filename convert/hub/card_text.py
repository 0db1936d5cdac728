"""The part of a model card that is made of the manifest: short, for people; all else is in FIT.md and the manifest."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from mmquant.tables import markdown

from ..files.parse import is_list, is_object
from ..fitting.text import FIT_TEXT, REPORT, command_line, machine_words
from ..models import ARCHITECTURES
from .hubs import HUBS
from .layout import split_of

LOCAL_REVISION = "0" * 40  # of a base that was read from a folder
UNKNOWN_BASE = "unknown"  # as convert.manifest has it, without its torch
MANIFEST, IMATRIX = "mmquant.fit.json", "imatrix.gguf"
Manifest = Mapping[str, Any]


def generated(manifest: Manifest, hub: str, repo: str, notice: str) -> str:
    """Licence, one row a type, one download, one command, use, quality, origin, known issues, sums."""
    name = repo.split("/")[1]
    parts = [f"# {name}", _license(manifest, notice), "## Pick a file", _types(manifest, repo), _example(manifest)]
    parts += ["## Download", _download(manifest, hub, repo, name), *_use(manifest), "## Quality", _quality(manifest)]
    parts += ["## How it was made", _made(manifest)]
    known = [k for a in manifest["artifacts"] for k in a.get("requires", {}).get("known_bad", [])]
    if known := list(dict.fromkeys([*known, *_splits(manifest)])):
        parts += ["## Known issues", "\n".join(f"- {k}" for k in known)]
    return "\n\n".join(p for p in parts if p)


def _license(manifest: Manifest, notice: str) -> str:
    model, licence = manifest["model"], manifest["license"]
    source = "a local checkpoint" if model["base_model"] == UNKNOWN_BASE else f"`{model['base_model']}`"
    if model["base_revision"] != LOCAL_REVISION:
        source += f" at revision `{model['base_revision']}`"
    lines = [f"> Quantized from {source}. Licence: see [LICENSE](LICENSE)."]
    if licence["commercial_use"] == "prohibited-without-authorization":
        lines.append("> **Commercial use, of the model or of any derivative such as this one, needs prior written")
        lines.append("> authorization from MiniMax.** Built with MiniMax M2.7.")
    return "\n".join([*lines, *([f"> {notice.split('. ')[0]}"] if notice else [])])


def _types(manifest: Manifest, repo: str) -> str:
    """One row a type, small to large: size, bits, distance, the smallest machines, the line that starts it."""
    rows: list[list[str]] = []
    for a in sorted(manifest["artifacts"], key=lambda a: a["weights"]["total"]):
        metrics = a.get("quality", {}).get("metrics", {})
        numbers = [_number(_kld(metrics, "mean"), 3), _number(metrics.get("top1"), 3)]
        size = sum(f["size"] for f in a["files"] if f["path"].endswith((".gguf", ".safetensors")))
        start = f"`{_start(a, repo)}`"
        machines = ", ".join(smallest([t for t in manifest["targets"] if t["artifact"] == a["id"]])) or "-"
        rows.append([_label(a), f"{size / 1e9:.2f}", _number(a.get("bits_per_weight"), 3), *numbers, machines, start])
    table = markdown(["type", "GB", "bits", "KLD", "top-1", "for (context)", "start"], rows)
    after = f"Every machine with its memory, context, placement and complete command: [{FIT_TEXT}]({FIT_TEXT})."
    after += f" The same as a page with plots: [{REPORT}]({REPORT})."
    return f"{table}\n\n{after}"


def _start(artifact: Manifest, repo: str) -> str:
    """The shortest line that serves a type."""
    if artifact["format"] == "gguf":
        return f"llama-server -hf {repo}:{_label(artifact)}"
    return f"mlx_lm.server --model {repo}" if artifact["format"] == "mlx" else f"vllm serve {repo}"


def _label(artifact: Manifest) -> str:
    return artifact.get("quant_label") or artifact["id"]


def smallest(targets: list[Manifest]) -> list[str]:
    """The machines that hold a type and than which none that does is smaller, with their RAM and context."""
    held = [t for t in targets if t["fits"] == "yes"] or [t for t in targets if t["fits"] == "tight"]
    sizes = [_sizes(t) for t in held]
    kept = [
        t
        for t, own in zip(held, sizes, strict=True)
        if not any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in sizes)
    ]
    return [f"{t['id']} ({t['context_tokens'] // 1024}K)" for t in kept]


def _sizes(target: Manifest) -> tuple[int, int]:
    """Bytes of cards, and of RAM; unified memory is a card's."""
    hardware = target["hardware"]
    if hardware.get("unified"):
        return hardware["host_ram"], 0
    return sum(gpu["count"] * gpu["memory"] for gpu in hardware["gpus"]), hardware["host_ram"]


def _example(manifest: Manifest) -> str:
    """The complete command of the smallest machine that holds the largest type there."""
    fitting = [t for t in manifest["targets"] if t["fits"] == "yes"] or [
        t for t in manifest["targets"] if t["fits"] == "tight"
    ]
    if not fitting:
        return "No machine of the table holds it."
    first = min(fitting, key=_sizes)
    return (
        f"For example on {machine_words(first)} ({first['artifact']}):\n\n```sh\n{command_line(first['launch'])}\n```"
    )


def _download(manifest: Manifest, hub: str, repo: str, name: str) -> str:
    line = f"{HUBS[hub].download} {repo} --local-dir {name}"
    models = [a for a in manifest["artifacts"] if a["format"] == "gguf"]
    if models:
        label = _label(models[0])
        line = f'{HUBS[hub].download} {repo} --include "{label}/*" --local-dir {name}'
    said = "One type:\n\n" if models else ""
    return f"{said}```sh\n{line}\ncd {name} && sha256sum -c --ignore-missing SHA256SUMS\n```"


def _use(manifest: Manifest) -> list[str]:
    """Prompt format, sampling, tool calls and thinking, where the architecture says them."""
    row = ARCHITECTURES.get(manifest["model"]["architecture"])
    serving = row.serving if row is not None else None
    if serving is None:
        return []
    sampling = ", ".join(f"{key} {value}" for key, value in serving.sampling.items())
    calls = (
        "Tool calls and thinking are parsed by the server: llama.cpp with `--jinja`, vLLM with "
        f"`--enable-auto-tool-choice {shlex.join(serving.vllm)}`, SGLang with `{shlex.join(serving.sglang)}`."
    )
    return ["## Use", f"Sampling: {sampling}.", f"{calls} {serving.thinking}", f"Prompt:\n\n```\n{serving.prompt}```"]


def _quality(manifest: Manifest) -> str:
    """What was measured against what, once for all types that share it; gates only where there were some."""
    said: dict[str, list[str]] = {}
    rows: list[list[str]] = []
    for a in manifest["artifacts"]:
        quality = a.get("quality", {"status": "not-measured"})
        metrics = quality.get("metrics", {})
        numbers = [metrics.get("ppl"), metrics.get("ppl_reference"), _kld(metrics, "p999"), metrics.get("nonfinite")]
        rows.append([_label(a), quality["status"], *(_number(n, 5) for n in numbers)])
        if quality.get("reference") or quality.get("corpus"):
            said.setdefault(_measured(quality), []).append(_label(a))
    table = markdown(["type", "status", "PPL", "PPL of the reference", "99.9 % KLD", "non-finite"], rows)
    notes = [f"{', '.join(labels)}: {note}" if len(said) > 1 else note for note, labels in said.items()]
    return "\n\n".join([table, *notes, *_behaviour(manifest)])


def _behaviour(manifest: Manifest) -> list[str]:
    """What a server of each type did with tools, thinking and language, where it was asked."""
    asked = [(_label(a), a["behaviour"]) for a in manifest["artifacts"] if "behaviour" in a]
    if not asked:
        return []
    names = list(asked[0][1]["rates"])
    rows = [[label, *(_share(found["rates"].get(name, {}).get("rate")) for name in names)] for label, found in asked]
    run = asked[0][1]["run"]
    asked_for = f"{run.get('prompts')} prompts in several languages, {run.get('loops')} times"
    said = f"Agents, per cent (`mmquant verify`, {asked_for}):"
    return [said, markdown(["type", *(name.replace("_", " ") for name in names)], rows)]


def _share(value: object) -> str:
    return f"{100 * value:.1f}" if isinstance(value, int | float) else "-"


def _measured(quality: Manifest) -> str:
    corpus = quality.get("corpus", {})
    sha = corpus.get("sha256")
    words = [f"{corpus['windows']} windows" if "windows" in corpus else ""]
    words += [f"of {corpus['context']} tokens" if "context" in corpus else ""]
    words += [f"text SHA-256 `{sha[:16]}`" if isinstance(sha, str) else ""]
    text = " ".join(word for word in words if word) or "its text is in the manifest"
    return f"KLD and top-1 against {quality.get('reference', 'no reference')}; {text}."


def _kld(metrics: Manifest, name: str) -> object:
    """One number of the distance, None where it was not measured."""
    kld: object = metrics.get("kld")
    return kld.get(name) if is_object(kld) else None


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, int | float) else "-"


def _made(manifest: Manifest) -> str:
    """The resolved command of each type; calibration text and imatrix named; the rest is the manifest's."""
    generator = manifest.get("generator", {})
    lines = [" ".join(a["provenance"]["command_line"]) for a in manifest["artifacts"] if _line_of(a)]
    version = f"{generator.get('name', 'mmquant')} {generator.get('version', '')}".strip()
    parts = [f"{version}."]
    if lines:
        parts.append("```sh\n" + "\n".join(lines) + "\n```")
    texts = dict.fromkeys(filter(None, (_calibration(a) for a in manifest["artifacts"])))
    parts += [f"Calibrated on {text}." for text in texts]
    if any(f["path"] == IMATRIX for a in manifest["artifacts"] for f in a["files"]):
        parts.append(f"Importance matrix: [{IMATRIX}]({IMATRIX}).")
    parts.append(f"Calibration, hashes and versions in full: [{MANIFEST}]({MANIFEST}).")
    return "\n\n".join(parts)


def _line_of(artifact: Manifest) -> list[str]:
    return artifact.get("provenance", {}).get("command_line") or []


def _calibration(artifact: Manifest) -> str:
    """The names of the calibration's texts, with their tokens where they are known."""
    found: object = artifact.get("provenance", {}).get("run", {}).get("calibration")
    corpus: object = found.get("corpus", found) if is_object(found) else None
    if not is_object(corpus):
        return ""
    sets: object = corpus.get("sets", [])
    names = [str(s["name"]) for s in (sets if is_list(sets) else []) if is_object(s) and "name" in s]
    tokens: object = corpus.get("tokens")
    return ", ".join(names) + (f" ({tokens:,} tokens)" if isinstance(tokens, int) and names else "")


def _splits(manifest: Manifest) -> list[str]:
    """Ollama takes no split GGUF: how to merge one."""
    entries = [a["entry"] for a in manifest["artifacts"] if a["format"] == "gguf" and split_of(a["entry"])[2] > 1]
    if not entries:
        return []
    stem = split_of(entries[0])[0]
    return [f"Ollama loads no split GGUF; merge first: `llama-gguf-split --merge {entries[0]} {stem}.gguf`"]
