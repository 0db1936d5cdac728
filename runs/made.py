"""The command line that a run is, as somebody would type it to get the same bytes; recorded in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mmquant import __version__

from ..convert import manifest
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.fitting.weights import Weights
from ..convert.manifest import Artifact, FileEntry
from ..convert.source import Source
from .option import Checked

LOCAL = ("statistics", "plan", "text", "evaluation")  # paths of this machine: their last part


def words_of(command: str, options: Checked) -> tuple[str, ...]:
    """The command and every option that is not at its default, and the type."""
    return (command, *_options(options))


def command_line(words: tuple[str, ...], source: Source, out: str) -> list[str]:
    """The whole line; empty for no words. The model with its commit where there is one, the folder by its name."""
    if not words:
        return []
    origin = source.origin
    here = Path(source.label).name
    model = f"{origin.hub}:{origin.repo}@{origin.revision}" if origin.repo and origin.revision else here
    return ["mmquant", words[0], "--model", model, *words[1:], "--out", out]


def _options(options: Checked) -> list[str]:
    words: list[str] = []
    for field in fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        default = field.default if field.default is not MISSING else None
        if value == default and field.name != "type":
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] if value else []
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [flag, Path(str(item)).name if isinstance(item, Path) or field.name in LOCAL else str(item)]
    return words


def finish_folder(
    out: Path,
    source: Checkpoint,
    storage: str,
    label: str,
    files: tuple[FileEntry, ...],
    weights: Weights,
    run: Mapping[str, Any],
    entry: str = ".",
    made: tuple[str, ...] = (),
) -> None:
    """Write the manifest, last of all files. made: the words of the command that was typed."""
    line = {"command_line": typed} if (typed := command_line(made, source, label)) else {}
    artifact = Artifact(label, storage, label, entry, files, weights, {"run": dict(run), **line})
    manifest.write(out, manifest.build(source, artifact, __version__))
