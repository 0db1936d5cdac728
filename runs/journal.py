"""The journal of a run: which artifacts it makes of what, and how far each is. Written whole at every change.

How many steps of an artifact are durable stands in its own folder (convert/files/progress.py), so that a folder can be
judged alone; the journal says what a folder is for, and that what a recipe asks for now is what it was made for.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from ..convert.files.atomic import append_line, write_whole
from ..convert.files.parse import parse_any, parse_json, take, take_list, take_map
from ..convert.files.progress import damaged

JOURNAL, LOG = "mmquant-run.json", "mmquant-run.log.jsonl"
STREAMS = ".mmquant-streams"  # hidden states and scores on their way, in the run's folder
FORMAT = 1
LINES = 1 << 14  # of a log's end that are read
# States of an artifact, in order.
STATES = ("waiting", "writing", "written", "checked", "pushed")
WAITING, WRITING, WRITTEN, CHECKED, PUSHED = STATES


@dataclass
class Entry:
    """One artifact: `asked` decides its bytes; `facts` are what was found out (path, bytes, scores, repositories)."""

    asked: dict[str, Any]
    state: str = WAITING
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Journal:
    """What a run folder holds. check: what the scores were made of."""

    folder: Path
    model: str = ""
    layers: int = 0
    state: str = "running"  # finished, or what it failed with
    artifacts: dict[str, Entry] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    fits: list[str] = field(default_factory=list)  # what fits the recipe's machines, in words

    def save(self) -> None:
        """Make it durable."""
        artifacts = {n: {"state": e.state, "asked": e.asked, "facts": e.facts} for n, e in self.artifacts.items()}
        data = {"format": FORMAT, "model": self.model, "layers": self.layers, "state": self.state}
        whole = data | {"artifacts": artifacts, "check": self.check, "fits": self.fits}
        write_whole(self.folder / JOURNAL, (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())

    def set(self, name: str, state: str, **facts: object) -> None:
        """An artifact has come so far."""
        entry = self.artifacts[name]
        entry.state = state
        entry.facts |= facts
        self.save()

    def event(self, name: str, /, **facts: object) -> None:
        """An event of this process in the run's log."""
        self.log({"event": name, "time": round(time.time(), 3), "process": os.getpid(), **facts})

    def log(self, event: Mapping[str, Any]) -> None:
        """One line more in the run's log; it may be lost in a power failure."""
        append_line(self.folder / LOG, json.dumps(event, ensure_ascii=False))


def read_journal(folder: Path) -> Journal | None:
    """The journal in a folder, None when there is none. InputError when it is damaged."""
    path = folder / JOURNAL
    if not path.is_file():
        return None
    data = parse_json(path.read_bytes(), str(path))
    if take(data, "format", int, str(path)) != FORMAT:
        raise damaged(path, f"format {data['format']}", f"format {FORMAT}", "choose another folder")
    found = Journal(folder, take(data, "model", str, str(path)), take(data, "layers", int, str(path)))
    found.state, found.check = take(data, "state", str, str(path)), take(data, "check", dict, str(path))
    found.fits = take_list(data, "fits", str, str(path), [])
    for name, entry in take_map(data, "artifacts", dict, str(path)).items():
        asked, facts = take(entry, "asked", dict, str(path)), take(entry, "facts", dict, str(path))
        found.artifacts[name] = Entry(asked, take(entry, "state", str, str(path)), facts)
    return found


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The events at the end of a folder's log; lines that a power failure cut are left out."""
    path = folder / LOG
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = deque(file, maxlen=LINES)
    found = []
    for line in lines:
        try:
            event = parse_any(line, str(path))
        except InputError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            found.append(event)
    return found
