"""What the functions of the Python API give back: dataclasses that a script, a table and a notebook can read."""

from __future__ import annotations

import html
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import FitError, InputError, MmquantError

if TYPE_CHECKING:
    from .needs import Needs


class Result(ABC):
    """Base of all results: `rows` are what a table shows of it."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The document that the command prints with --json: plain values only."""

    def rows(self) -> list[dict[str, Any]]:
        """The result as a table, one dictionary a row."""
        return [self.to_dict()]

    def to_frame(self) -> Any:  # noqa: ANN401 - pandas is not required
        """`rows` as a pandas DataFrame. InputError where pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise InputError("to_frame: pandas is not installed, expected pip install pandas") from None
        return pandas.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        rows = self.rows()
        if not rows:
            return "<em>nothing</em>"
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(shown(value))}</td>" for value in row.values()) + "</tr>"
            for row in rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def shown(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


@dataclass(frozen=True)
class Quantized(Result):
    """An artifact that was written, or with `dry_run` would be.

    path      what an engine is given: the folder, or the (first) GGUF file; bytes: of its weights
    line      what the command prints
    refusal   of a dry run: what the real one would stop at, for example a disk that is too small
    needs     of a dry run: download, disk, memory, passes, time
    """

    path: Path
    label: str
    bytes: int
    dry_run: bool
    line: str
    refusal: MmquantError | None = None
    needs: Needs | None = None

    def to_dict(self) -> dict[str, Any]:
        """The document that the command prints with --json."""
        return {"path": str(self.path), "label": self.label, "bytes": self.bytes, "dry_run": self.dry_run} | {
            "refusal": str(self.refusal) if self.refusal else None,
            "needs": self.needs.to_dict() if self.needs else None,
        }

    def manifest(self) -> dict[str, Any]:
        """The manifest (mmquant.fit.json) of its folder. InputError when there is none."""
        from ..convert import manifest

        folder = self.path if self.path.is_dir() else self.path.parent
        found = manifest.read(folder)
        if found is None:
            raise InputError(f"{folder}: {manifest.MANIFEST} is missing, expected a finished artifact")
        return found


def written(path: Path, label: str, size: int) -> Quantized:
    """The result of a run that wrote `path`."""
    return Quantized(path, label, size, False, str(path))


def planned(out: Path, label: str, needs: Needs, check: Callable[[], None]) -> Quantized:
    """The result of a dry run; check: raises what a real run would. What would stop it does not fit: exit code 5."""
    from .place import describe

    refusal = None
    try:
        check()
    except MmquantError as error:
        refusal = error if isinstance(error, FitError) else FitError(str(error))
    lines = [describe(out, label, needs.output), *needs.lines("no" if refusal else "yes")]
    return Quantized(out, label, needs.output, True, "\n".join(lines), refusal, needs)
