"""Choose the evaluation text, and check that no artifact was calibrated on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import InputError
from mmquant.monitor import current

from ...convert import manifest

if TYPE_CHECKING:
    from ...calibration.text.chat import ChatTemplate
    from ...calibration.text.sample import Sample, Text
    from ...convert.source import Source
    from ..options_use import EvalOptions


def manifest_folder(artifact: str) -> Path:
    """Where an artifact's manifest lies: the folder itself, or the one that holds the GGUF file."""
    path = Path(artifact)
    return path.parent if path.suffix == ".gguf" else path


def make_eval_sample(
    basis: Source,
    artifacts: tuple[str, ...],
    options: EvalOptions,
    used: Mapping[str, set[str]] | None = None,
) -> Sample:
    """Windows of the named texts, or of the bundled held-out ones.

    used: digests of what artifacts were calibrated on, where no manifest tells yet.

    InputError for a context beyond the model's, ValueError for text that an artifact was calibrated on.
    """
    from ...calibration.text.chat import load_template
    from ...calibration.text.corpus import DEFAULT
    from ...calibration.text.sample import make_sample, read_texts
    from ...calibration.text.tokenizer import load_tokenizer

    small = basis.geometry.max_context < 8192
    context, texts = options.context or (512 if small else 2048), options.text
    texts = () if texts == (DEFAULT,) else texts
    if context > basis.geometry.max_context:
        raise InputError(f"eval: a context of {context}, the model has at most {basis.geometry.max_context}")
    template = load_template(basis)
    notes: list[str] = []
    read = read_texts(texts, template, notes)
    for note in notes:
        current().message(note)
    if texts:
        for artifact in artifacts:
            check_unseen(read, artifact, template, None if used is None else used[artifact])
    count = options.windows or (None if texts and options.convention == "llama.cpp" else 64 if small else 128)
    return make_sample(read, load_tokenizer(basis), context, count, options.convention, options.stride)


def check_unseen(
    texts: list[Text], artifact: str, template: ChatTemplate | None, known: set[str] | None = None
) -> None:
    """Refuse text that an artifact was calibrated on, as far as its manifest tells.

    A text whose documents are those of a calibration set is found by its digest; where the bundled set was used, also
    one that only shares passages with it. Raises ValueError naming text and artifact.
    """
    import numpy as np

    from ...calibration.text.corpus import read_sets
    from ...calibration.text.overlap import check_disjoint, shingles

    used = calibration_sets(artifact) if known is None else known
    for text in texts:
        if text.digest in used:
            raise InputError(f"{text.name}: {artifact} was calibrated on it, expected text that it has not seen")
    ours = [part for part in read_sets([], template) if part.sha256 in used]
    if ours:
        passages = np.concatenate([shingles(document.text) for part in ours for document in part.documents])
        check_disjoint(((text.name, text.joined()) for text in texts), passages)


def calibration_sets(artifact: str) -> set[str]:
    """Digests of the sets of text that an artifact was calibrated on; none when its manifest names none."""
    folder = manifest_folder(artifact)
    found = manifest.read(folder) if folder.is_dir() else None
    runs = [entry.get("provenance", {}).get("run", {}) for entry in (found or {}).get("artifacts", [])]
    return sets_of(runs)


def sets_of(runs: Iterable[Mapping[str, Any]]) -> set[str]:
    """Digests of the sets of text that runs were calibrated on."""
    corpora = [run["calibration"].get("corpus") for run in runs if isinstance(run.get("calibration"), dict)]
    sets = [part for corpus in corpora if isinstance(corpus, dict) for part in corpus.get("sets", [])]
    return {str(part["sha256"]) for part in sets if part.get("windows")}
