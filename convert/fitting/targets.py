"""Machines to fit a model to: the package's table (data/fit/targets.yaml), the user's own, or --gpu and --ram."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mmquant.errors import InputError, naming, suggest

from ..files.parse import is_list, is_object, parse_yaml, read_small, short
from ..files.sizes import parse_size

ENGINES = ("llama.cpp", "vllm", "mlx_lm")
CARD_SHARE = 0.98  # of an unknown card that its driver leaves
SOLD_RAM = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # in GB: as makers say GiB
SOLD_CARDS = (8, 10, 11, 12, 20)  # likewise, besides those of the table
KEYS = {"id", "card", "count", "ram", "reserved", "bandwidth", "name", "engines", "unified", "ram_bandwidth"}
MOST_CARDS = 64
LEAST_MEMORY = 10**6  # less is a number without its unit
_LABEL = re.compile(r"(\d+) ?GB", re.IGNORECASE)
_MAC = re.compile(r"\Amac-(\d+)(?:gb)?\Z")
_GPUS = re.compile(r"\s*(.+?)\s*(?:[x*]\s*(\d+))?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Cards:
    """`count` equal cards. Bytes of one: all, and what its driver leaves; bandwidth: bytes a second."""

    name: str
    count: int
    memory: int
    usable: int
    bandwidth: int
    amd: bool = False


@dataclass(frozen=True)
class Target:
    """A machine. ram, ram_usable: bytes in all, and what the system leaves; None for `cards`: RAM alone, or unified."""

    id: str
    cards: Cards | None
    ram: int
    ram_usable: int
    ram_bandwidth: int
    unified: bool = False
    name: str = ""
    engines: tuple[str, ...] = ENGINES


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    text = resources.files("mmquant").joinpath("data", "fit", "targets.yaml").read_text()
    return yaml.safe_load(text)


def read_targets(file: Path | None = None) -> dict[str, Target]:
    """The package's targets by id; those of a YAML file of the user (`targets:` a list) besides, its own first.

    InputError for what is no target.
    """
    own = _of_file(file) if file is not None else []
    found = [_target(entry) for entry in [*own, *_table()["targets"]]]
    return _first_wins(found)


def _first_wins(targets: list[Target]) -> dict[str, Target]:
    found: dict[str, Target] = {}
    for target in targets:
        found.setdefault(target.id, target)
    return found


def _of_file(file: Path) -> list[dict[str, Any]]:
    where = f"--targets {file}"
    document = parse_yaml(read_small(file, where, "a YAML file of machines"), where)
    entries = document.get("targets") if is_object(document) else document
    if not is_list(entries) or not all(map(is_object, entries)):
        raise InputError(f"{where}: expected `targets:` with a list of machines")
    with naming(where):
        for entry in entries:
            _target(entry)
    return entries


def _target(entry: Mapping[str, Any]) -> Target:
    """A row of the table as a Target; InputError for a key or a value that is none."""
    name = entry.get("id")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]{1,64}", name):
        raise InputError(f"id is {short(name)}, expected a short word such as 24GB+96GB")
    with naming(name):
        for key in entry:
            if key not in KEYS:
                raise InputError(f"{short(key)} is no key of a target; {suggest(str(key), KEYS)}")
        return _checked_target(name, entry)


def _checked_target(name: str, entry: Mapping[str, Any]) -> Target:
    unified, ram = bool(entry.get("unified")), ram_bytes(_text(entry, "ram"))
    reserved = parse_size(str(entry.get("reserved", _table()["ram"]["reserved"])))
    if reserved >= ram:
        raise InputError(f"ram {ram:,} bytes, expected more than the {reserved:,} that the system keeps")
    speed = entry.get("bandwidth") if unified else entry.get("ram_bandwidth")
    cards = None if unified or "card" not in entry else _cards(entry)
    engines: object = entry.get("engines", list(ENGINES))
    if not is_list(engines) or any(engine not in ENGINES for engine in engines):
        raise InputError(f"engines is {short(engines)}, expected some of {', '.join(ENGINES)}")
    bandwidth = parse_size(str(speed or _table()["ram"]["bandwidth"]))
    return Target(name, cards, ram, ram - reserved, bandwidth, unified, str(entry.get("name", "")), tuple(engines))


def _text(entry: Mapping[str, Any], key: str) -> str:
    if key not in entry:
        raise InputError(f"{key} is missing, expected a size such as 96GB")
    return str(entry[key])


def _cards(entry: Mapping[str, Any]) -> Cards:
    count = entry.get("count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_CARDS:
        raise InputError(f"count is {short(count)}, expected 1 to {MOST_CARDS}")
    card = card_of(str(entry["card"]))
    bandwidth = parse_size(str(entry["bandwidth"])) if "bandwidth" in entry else card.bandwidth
    return Cards(str(entry.get("name", card.name)), count, card.memory, card.usable, bandwidth, card.amd)


def card_of(text: str) -> Cards:
    """One card of a size: 24GB is a card that is sold as such; any other size is taken as it stands."""
    label = _LABEL.fullmatch(text.strip())
    known = _table()["cards"].get(f"{label[1]}GB") if label else None
    if known is None:
        size = int(label[1]) << 30 if label and int(label[1]) in SOLD_CARDS else memory_bytes(text)
        return Cards(f"{text.strip()} card", 1, size, int(size * CARD_SHARE), parse_size("900GB"))
    sizes = {key: parse_size(known[key]) for key in ("memory", "usable", "bandwidth")}
    return Cards(known["name"], 1, **sizes, amd=bool(known.get("amd")))


def ram_bytes(text: str) -> int:
    """RAM of a size: 96GB, which is sold so, is 96 GiB; 98GB, 98GiB and 98e9 are what they say."""
    label = _LABEL.fullmatch(text.strip())
    return int(label[1]) << 30 if label and int(label[1]) in SOLD_RAM else memory_bytes(text)


def memory_bytes(text: str) -> int:
    """Bytes of a memory. InputError for a size that is none, and for a number that lost its unit."""
    size = parse_size(text)
    if size < LEAST_MEMORY:
        raise InputError(f"{text.strip()} is {size} bytes, expected a size with its unit such as 24GB")
    return size


def machine(gpu: str | None, ram: str | None) -> Target:
    """The target of --gpu SIZE[xN] and --ram SIZE. InputError for a size that is none, and for neither."""
    cards = None
    if gpu is not None:
        match = _GPUS.fullmatch(gpu)
        count = int(match[2] or 1) if match and len(match[2] or "") < 4 else 0
        if match is None or not 1 <= count <= MOST_CARDS:
            raise InputError(f"--gpu {gpu}: expected SIZE or SIZExN such as 24GB or 24GBx2, up to {MOST_CARDS}")
        with naming("--gpu"):
            card = card_of(match[1])
        cards = Cards(card.name, count, card.memory, card.usable, card.bandwidth, card.amd)
    with naming("--ram"):
        size = ram_bytes(ram or "16GB")
    reserved = min(parse_size(_table()["ram"]["reserved"]), size // 4)
    words = [gpu.replace(" ", "")] if gpu else []
    words += [ram.replace(" ", "")] if ram else []
    bandwidth = parse_size(_table()["ram"]["bandwidth"])
    return Target("+".join(words) or "16GB-RAM", cards, size, size - reserved, bandwidth)


def known_target(name: str, targets: Mapping[str, Target]) -> Target | None:
    """A target by its name, upper or lower case; mac-128 means 128GB-unified. None for an unknown one."""
    folded = {name.lower(): target for name, target in targets.items()}
    return folded.get(_MAC.sub(r"\1gb-unified", name.strip().lower()))


def find_target(name: str, targets: Mapping[str, Target]) -> Target:
    """As `known_target`; InputError that names the close ones."""
    if (found := known_target(name, targets)) is None:
        raise InputError(f"--target {name}: unknown, {suggest(name, targets)}")
    return found
