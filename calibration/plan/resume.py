"""Keep a measurement between layers, so that a killed one continues."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ...convert.files.atomic import write_whole
from ...convert.files.parse import parse_json, take, take_list
from ...convert.files.progress import damaged
from ..model.hidden import RAM_LIMIT, HiddenStates, load_states, save_states
from .probes import Probes
from .sensitivity import Measured, read_measured

NOTES = ".mmquant-sensitivity.json"
SPARSE = 8  # layers between two states where one takes more than RAM_LIMIT bytes


class Measurement(Protocol):
    """A pass that measures, layer by layer: `begin`, every layer, `finish`.

    judged: its probes; found: what is known of each group; states: the streams that it needs to continue
    """

    judged: Probes
    found: dict[str, Measured]

    def states(self) -> dict[str, HiddenStates]:
        """By name."""
        ...

    def begin(self) -> None:
        """Enter the first layer."""
        ...

    def layer(self, number: int) -> None:
        """Measure a layer, and leave it."""
        ...

    def finish(self) -> dict[str, Measured]:
        """Everything, by group."""
        ...


def keep(folder: Path, identity: str, m: Measurement, layers: int) -> None:
    """Make durable what enters layer `layers`; what was kept before it goes."""
    states = m.states()
    if layers % SPARSE and sum(found.bytes for found in states.values()) > RAM_LIMIT:
        return
    save_states(_path(folder, layers), states)
    notes: dict[str, Any] = {"run": identity, "layers": layers, "windows": len(m.judged.tokens)}
    notes["blocks"] = [block.names for block in m.judged.blocks]
    notes["groups"] = {name: asdict(found) for name, found in m.found.items()}
    write_whole(folder / NOTES, json.dumps(notes).encode())
    for path in folder.glob(".hidden-plan-*"):
        if path != _path(folder, layers):
            path.unlink(missing_ok=True)


def take_up(folder: Path, identity: str, m: Measurement) -> int | None:
    """Fill a measurement with what was kept; how many layers are done, None where nothing is.

    InputError where it is of another run, damaged or gone.
    """
    path = folder / NOTES
    if not path.is_file():
        return None
    where = str(path)
    notes = parse_json(path.read_bytes(), where)
    if take(notes, "run", str, where) != identity:
        raise damaged(path, "a measurement of another model or text", "this one's")
    layers = take(notes, "layers", int, where)
    for name, entry in take(notes, "groups", dict, where).items():
        if not isinstance(entry, dict):
            raise damaged(path, f"{name[:40]} is no object", "what was measured of it")
        m.found[name] = read_measured(entry, len(m.judged.tokens), f"{where}: {name[:40]}")
    for block in take_list(notes, "blocks", list, where):
        names = [(str(probe[0]), str(probe[1])) for probe in block if isinstance(probe, list) and len(probe) == 2]
        m.judged.open(names)
    load_states(_path(folder, layers), m.states())
    return layers


def forget(folder: Path) -> None:
    """The measurement is over: remove what was kept."""
    for path in (folder / NOTES, *folder.glob(".hidden-*")):
        path.unlink(missing_ok=True)


def _path(folder: Path, layers: int) -> Path:
    return folder / f".hidden-plan-{layers:03d}"
