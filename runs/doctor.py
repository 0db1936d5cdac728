"""Diagnose a GGUF file, and repair its float16 overflow, or a quantized folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import InputError
from mmquant.monitor import Monitor, watching
from mmquant.tables import table

from .corpus import make_corpus
from .models import choose_device
from .options import TextOptions
from .options_use import DoctorOptions
from .results import Result

if TYPE_CHECKING:
    from torch import Tensor

    from ..convert.checkpoints.quantized_folder import QuantizedFolder
    from ..convert.findings import Finding
    from ..convert.gguf.reader import GgufSource


@dataclass(frozen=True)
class Diagnosis(Result):
    """What was found in a GGUF file or a folder, and what was done about it."""

    file: str
    findings: list[Finding]
    rescaled: dict[tuple[int, int], int]  # (layer, expert) -> k: up / 2^k, down * 2^k
    written: list[Path]
    sums: Tensor | None  # [L, E]: the largest sum of inputs of each expert's down projection

    @property
    def errors(self) -> list[Finding]:
        """Findings that give wrong results."""
        return [finding for finding in self.findings if finding.level == "error"]

    def to_dict(self) -> dict[str, Any]:
        """The document of `mmquant doctor --json`."""
        return {
            "file": self.file,
            "findings": [asdict(finding) for finding in self.findings],
            "rescaled": [
                {"layer": layer, "expert": expert, "power": k} for (layer, expert), k in self.rescaled.items()
            ],
            "written": [str(path) for path in self.written],
            "largest_sum32": None if self.sums is None else float(self.sums.max()),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row each, for tables."""
        return [asdict(finding) for finding in self.findings]

    def lines(self) -> list[str]:
        """The same for people."""
        found = []
        for finding in self.findings:
            experts = f" (experts {', '.join(map(str, finding.experts))})" if finding.experts else ""
            found.append(f"{finding.level}: {finding.where}: {finding.text}{experts}")
        found += self._rescaled_lines()
        found += [str(path) for path in self.written]
        return found or [f"{self.file}: nothing found"]

    def _rescaled_lines(self) -> list[str]:
        """A table of the rescaled experts: up / 2^k, down * 2^k, and how far their sums are below float16's limit."""
        from ..quantize.overflow import FP16_MAX

        head = ("rescaled layer", "expert", "up / 2^k, down * 2^k")
        if not self.rescaled or self.sums is None:
            return table(head, [(*where, power) for where, power in self.rescaled.items()]) if self.rescaled else []
        rows = []
        for (layer, expert), power in self.rescaled.items():
            largest = float(self.sums[layer, expert])
            numbers = (f"{largest:.4g}", f"{largest / 2**power:.4g}", f"{FP16_MAX * 2**power / largest:.1f}")
            rows.append((layer, expert, power, *numbers))
        return table((*head, "largest sum", "now", f"times below {FP16_MAX:.0f}"), rows)


def doctor(
    file: str | Path,
    options: DoctorOptions | None = None,
    *,
    device: str | None = None,
    monitor: Monitor | None = None,
) -> Diagnosis:
    """Look for what gives wrong results in a GGUF file (or `hf:ORG/NAME:TYPE`).

    With `fix` rescale, exactly, the experts whose sums overflow float16. Raises InputError for a file that is none, or
    a place for the fixed copy that is taken.
    """
    with watching(monitor):
        return examine(file, options or DoctorOptions(), choose_device(device))


def examine(file: str | Path, options: DoctorOptions, device: str) -> Diagnosis:
    """Look for what gives wrong results in a GGUF file, or in a quantized folder."""
    source = open_folder(file)
    if source is None:
        return examine_gguf(file, options, device)
    from ..convert.folder.doctor import examine_folder

    given = [name for name in ("statistics", "text", "fix") if getattr(options, name)]
    if given:
        raise InputError(f"{file}: --{given[0]} is for GGUF files, this is a safetensors folder")
    found = examine_folder(source, device)
    source.close(finished=True)
    return Diagnosis(source.label, found, {}, [], None)


def open_folder(file: str | Path) -> QuantizedFolder | None:
    """The quantized folder, or hub repository of one, that `file` names; None for GGUF."""
    from ..convert.checkpoints.quantized_folder import QuantizedFolder
    from ..convert.gguf.reader import GgufSource
    from ..convert.hub.address import parse_address
    from ..convert.open import is_gguf, open_source

    address, path = parse_address(str(file)), Path(file)
    if address.kind is not None or (address.spec is None and (is_gguf(path) or not path.is_dir())):
        return None
    source = open_source(file)
    if isinstance(source, GgufSource):
        source.close()
        return None
    if not isinstance(source, QuantizedFolder):
        raise InputError(f"{file}: not quantized below 8 bits, expected a GGUF file or a quantized folder")
    return source


def examine_gguf(file: str | Path, options: DoctorOptions, device: str) -> Diagnosis:
    """Look for what gives wrong results in a GGUF file; with `fix` rescale the experts that overflow, exactly."""
    from ..convert.gguf.doctor import OVERFLOW, check_metadata, check_overflow, check_tensors, exponents
    from ..convert.gguf.fix import finish_interrupted
    from ..convert.gguf.reader import GgufSource, folder_of
    from ..convert.hub.address import parse_address
    from ..convert.hub.gguf_repository import open_gguf_repository

    address = parse_address(str(file))
    if address.spec is not None and options.fix:
        raise InputError(f"{file}: --fix writes beside the file, expected one on this machine (mmquant pull)")
    completed = finish_interrupted(folder_of(Path(file))) if options.fix and options.in_place else []
    source = GgufSource(Path(file)) if address.spec is None else open_gguf_repository(address.spec, address.kind)
    source.validate()
    sums = measure(source, options, device)
    faults = check_metadata(source) + check_tensors(source) + check_overflow(source, sums)
    powers = exponents(sums) if options.fix and sums is not None else {}
    written: list[Path] = completed
    if powers:
        written, powers, left = rescale(source, powers, options.out, options.in_place)
        faults = [fault for fault in faults if fault.code != OVERFLOW] + left
    source.close(finished=True)
    return Diagnosis(source.label, faults, powers, written, sums)


def measure(source: GgufSource, options: DoctorOptions, device: str) -> Tensor | None:
    """[L, E] largest sums of inputs of down, from statistics (always of 32) or from text; None without either."""
    import torch

    statistics = options.statistics
    if statistics is not None:
        from ..calibration.statistics.store import open_statistics

        stored = open_statistics(statistics)
        if stored.layers < source.geometry.layers:
            raise InputError(f"{statistics}: {stored.layers} layers, the file has {source.geometry.layers}")
        layers = (stored.layer(layer, second=False) for layer in range(source.geometry.layers))
        sums = torch.stack([layer.expert_mid.sum32 for layer in layers])
        if sums.shape[1] != source.geometry.experts:
            raise InputError(f"{statistics}: {sums.shape[1]} experts, the file has {source.geometry.experts}")
        return sums
    if not options.text:
        return None
    from ..calibration.gguf.maxima import largest_sums
    from ..convert.gguf.doctor import summed

    corpus = make_corpus(source, TextOptions(text=options.text, windows=options.windows, context=options.context))
    return largest_sums(
        source, corpus.tokens, device, [summed(source, layer) for layer in range(source.geometry.layers)]
    )


def rescale(
    source: GgufSource, powers: dict[tuple[int, int], int], out: Path | None, in_place: bool
) -> tuple[list[Path], dict[tuple[int, int], int], list[Finding]]:
    """Write the fixed model: its files, rescaled experts, what was left alone. InputError over other files."""
    from ..convert.gguf.doctor import plan_fix
    from ..convert.gguf.fix import apply_fix

    first = source.files[0].path
    target = None if in_place else out or first.parent.with_name(first.resolve().parent.name + "-fixed")
    patches, done, left = plan_fix(source, powers)
    what = {"model": source.fingerprint, "powers": [[*where, power] for where, power in sorted(done.items())]}
    return apply_fix(source, patches, target, what) if patches else [], done, left
