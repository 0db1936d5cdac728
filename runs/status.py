"""How far a run is: in progress, finished, stopped or killed, told from its journal and its log alone."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmquant.errors import InputError
from mmquant.tables import clock, gib, table

from ..convert.files.lock import HOLDER
from .engine import step_name
from .journal import Journal, read_journal, read_log
from .results import Result
from .summary import number, remarks, totals

HEAD = ("artifact", "state", "last step", "time", "bits", "KLD", "uploaded")


@dataclass(frozen=True)
class Status(Result):
    """What a run folder says. state: running, finished, gate, stopped or killed; reason: of the last three.

    step     how many steps every artifact has, of `steps`: the embeddings, each layer, the head
    facts    of that step: seconds_per_step, seconds_left, memory, disk_free
    table    one dictionary for each artifact
    """

    folder: Path
    model: str
    state: str
    reason: str
    step: int
    steps: int
    facts: dict[str, Any]
    table: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The document of --json."""
        whole = {"folder": str(self.folder), "model": self.model, "state": self.state, "reason": self.reason}
        return {**whole, "step": self.step, "steps": self.steps, **self.facts, "artifacts": self.table}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each artifact."""
        return self.table

    def lines(self) -> list[str]:
        """The same for people."""
        layers = self.steps - 2
        where = f"{step_name(self.step - 1, layers)} of {layers}" if self.step else "no layer"
        where = f"all {layers} layers" if self.step == self.steps else where
        lines = [
            f"{self.folder}: {self.state}{': ' + self.reason if self.reason else ''}",
            f"{self.model}: {where} done",
        ]
        if self.state == "running" and self.facts:
            rate = f"{self.facts['seconds_per_step']:.3g} s a step, about {clock(self.facts['seconds_left'])} left"
            memory, disk = gib(self.facts["memory"]), self.facts["disk_free"] / 1e9
            lines.append(f"{rate}; {memory} in memory, {disk:.1f} GB of disk free")
        lines += table(HEAD, [_cells(row) for row in self.table], text=HEAD[:3])
        for row in self.table:
            lines += [f"{row['name']}: {'; '.join(found)}" for found in [remarks(row)] if found]
            lines += [f"failed: {text}" for text in row.get("failures", [])]
        if self.state in ("stopped", "killed"):
            lines.append("run the same command again to continue")
        return lines


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    scores = row.get("scores", {})
    shown = [number(scores.get(name)) for name in ("bits", "kld")]
    return row["name"], row["state"], row["last"], clock(row["seconds"]), *shown, row.get("uploaded")


def status(folder: str | Path) -> Status:
    """How far the run in `folder` is; nothing is written. InputError when there is none."""
    folder = Path(folder)
    journal = read_journal(folder)
    if journal is None:
        raise InputError(f"{folder}: no run of mmquant, expected a folder of mmquant run --out")
    events = read_log(folder)
    begin = next((e for e in reversed(events) if e["event"] == "begin"), {})
    last = next((e for e in reversed(events) if e["event"] == "step"), {"step": -1})  # the log counts from 0
    state, reason = state_of(journal, folder)
    names = ("seconds_per_step", "seconds_left", "memory", "disk_free")
    facts = {name: last[name] for name in names if name in last}
    steps = begin.get("steps", journal.layers + 2)
    return Status(folder, journal.model, state, reason, last["step"] + 1, steps, facts, rows_of(journal, events, steps))


def rows_of(journal: Journal, events: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """One row for each artifact: its state, the last step that it has, the seconds that the known ones took."""
    rows = []
    for name, entry in journal.artifacts.items():
        own = [e for e in events if e["event"] == "artifact" and e.get("name") == name]
        last = step_name(own[-1]["step"], steps - 2) if own else "-"
        left = len({e["file"] for e in events if e["event"] == "uploaded" and e.get("name") == name})
        more = totals(events, name) | ({"uploaded": left} if left else {})
        rows.append({"name": name, "state": entry.state, "last": last, **more, **entry.facts})
    return rows


def state_of(journal: Journal, folder: Path) -> tuple[str, str]:
    """What a run is doing, and why it is not."""
    state, _, reason = journal.state.partition(": ")
    if state != "running":
        return state, reason
    return ("running", "") if is_held(folder) else ("killed", "its process is gone")


def is_held(folder: Path) -> bool:
    """Whether the process that says it holds the folder is there; one on another machine is believed."""
    try:
        words = (folder / HOLDER).read_text("utf-8", errors="replace").split()
        if len(words) != 4 or words[3] != socket.gethostname():
            return len(words) == 4
        os.kill(int(words[1]), 0)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def as_text(found: Status, as_json: bool) -> str:
    """What the command prints."""
    return json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(found.lines())
