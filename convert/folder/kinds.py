"""What a planned folder may store the parts of a layer as: the words of a plan, and what each format has of them.

A unit is what engines load under one scheme: all experts of a layer (vLLM and SGLang take the scheme of the first), or
its attention. `plan_row` has one row for each command that writes such a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmquant.errors import InputError

from ..checkpoints.checkpoint import Checkpoint
from ..formats.format import Format, Scheme, specs
from ..formats.fp8_block import TILE
from ..formats.table import choices
from ..models.geometry import Geometry
from .fp8 import fp8_scheme

EXPERTS, ATTENTION = "experts", "attention"
EMBEDDINGS, HEAD = "embeddings", "head"  # units outside the layers, where a format quantizes them
BF16, FP8 = "bf16", "fp8"
EXPERT_FIELDS, ATTENTION_FIELDS = ("gate", "up", "down"), ("q", "k", "v", "o")  # of LayerWeights
MLX_BITS, MLX_GROUPS = (2, 3, 4, 5, 6, 8), (128, 64, 32)


@dataclass(frozen=True)
class Kind:
    """One way to store a unit. storage: None for bfloat16; group: inputs that share a scale, -1 a whole row."""

    word: str
    storage: Format | None = None
    bits: int = 16
    group: int = -1

    @property
    def calibrated(self) -> bool:
        """Whether a calibrated method finds its codes; FP8 is carried from the release or rounded to nearest."""
        return self.storage is not None and not self.storage.requantizable

    def scheme(self, source: Checkpoint) -> Scheme | None:
        """How its matrices lie in a folder made of `source`."""
        if self.storage is None:
            return None
        if self.storage.requantizable:
            return fp8_scheme(source, self.storage)
        return Scheme(self.storage, self.bits, self.group, self.storage.symmetric[0])

    @property
    def span(self) -> int:
        """Inputs that tensor parallelism must not cut; 0: none."""
        if self.storage is None:
            return 0
        return TILE[1] if self.storage.requantizable else max(0, self.group)

    def divides(self, inputs: int, devices: int = 1) -> bool:
        """Whether no group or tile of it straddles two of the devices that share `inputs`."""
        return not inputs % (devices * max(1, self.span))


@dataclass(frozen=True)
class Unit:
    """Matrices that share a kind. fields: of LayerWeights, none outside the layers; kinds: from small to large."""

    fields: tuple[str, ...]
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class PlanRow:
    """What a plan of one command chooses among. probes: words of the kinds whose distance is measured to the end."""

    command: str
    units: Mapping[str, Unit]
    probes: tuple[str, ...]

    def kinds(self, unit: str, g: Geometry, devices: int = 1) -> tuple[Kind, ...]:
        """Those that the model's matrices allow, split over devices in tensor parallelism.

        Engines split the inputs of down and o; the others keep theirs whole.
        """
        fields = self.units[unit].fields
        split = [g.expert_width] * ("down" in fields) + [g.heads * g.head_dim] * ("o" in fields)
        return tuple(
            kind
            for kind in self.units[unit].kinds
            if kind.divides(g.hidden) and all(kind.divides(inputs, devices) for inputs in split)
        )

    def groups(self, g: Geometry, devices: int = 1) -> dict[str, tuple[Kind, ...]]:
        """By name, everything that has a choice, in writing order. InputError where nothing divides the model."""
        inside = [name for name, unit in self.units.items() if unit.fields]
        outside = [name for name, unit in self.units.items() if not unit.fields]
        allowed = {name: self.kinds(name, g, devices) for name in self.units}
        for name, kinds in allowed.items():
            if not any(kind.calibrated for kind in kinds):
                raise InputError(f"{self.command}: no group size divides the {name} over {devices} devices")
        found = {group_name(layer, name): allowed[name] for layer in range(g.layers) for name in inside}
        return found | {name: allowed[name] for name in outside}


def group_name(layer: int, unit: str) -> str:
    """What a plan calls a unit of a layer."""
    return f"layers.{layer}.{unit}"


def plan_row(command: str) -> PlanRow:
    """What the plan of a command chooses among. InputError for a command without plans."""
    if command not in planned_commands():
        raise InputError(f"--format {command}: expected one of {', '.join(planned_commands())}")
    if command == "mlx":
        kinds = _kinds("mlx", MLX_BITS, MLX_GROUPS)
        units = {name: Unit((name,), kinds) for name in EXPERT_FIELDS}
        units |= {ATTENTION: Unit(ATTENTION_FIELDS, kinds), EMBEDDINGS: Unit((), kinds), HEAD: Unit((), kinds)}
        return PlanRow("mlx", units, ("mlx-2-g64", "mlx-4-g64", "mlx-6-g64"))
    wide = (Kind(FP8, choices("fp8")["block"], 8), Kind(BF16))
    if command == "int4":
        narrow = _kinds("int4", (4,), (128, 64, 32))
        eight = _kinds("int8", (8,), (128,), "int4")
        kinds, probes = (*narrow, *eight, *wide), ("int4-g128", "int4-g32")
    else:
        size = next(iter(choices(command).values())).group_sizes
        assert size is not None
        kinds, probes = (Kind(command, next(iter(choices(command).values())), 4, size[0]), *wide), (command,)
    return PlanRow(command, {ATTENTION: Unit(ATTENTION_FIELDS, kinds), EXPERTS: Unit(EXPERT_FIELDS, kinds)}, probes)


def planned_commands() -> tuple[str, ...]:
    """Commands that write planned folders: those whose format stands in the table."""
    return tuple(name for name in ("int4", "nvfp4", "mxfp4", "mlx") if choices(name))


def stored_bits(row: PlanRow, word: str) -> float:
    """Bits of storage for a weight of a kind, scales included."""
    kind = next(kind for unit in row.units.values() for kind in unit.kinds if kind.word == word)
    if kind.storage is None:
        return 16.0
    block = TILE if kind.storage.tiled else None
    side = 4096  # a matrix in which what lies beside its groups does not count
    found = specs(Scheme(kind.storage, kind.bits, kind.group, kind.storage.symmetric[0], block), "", (side, side))
    return 8 * sum(spec.bytes for spec in found) / side**2


def _kinds(word: str, bits: tuple[int, ...], groups: tuple[int, ...], command: str = "") -> tuple[Kind, ...]:
    """Of the command's own format; by size, as scales of 16 bits a group have it."""
    storage = next(iter(choices(command or word).values()))
    every = sorted(((b, g) for b in bits for g in groups), key=lambda pair: pair[0] + 32 / pair[1])
    several = len(bits) > 1
    return tuple(Kind(f"{word}-{b}-g{g}" if several else f"{word}-g{g}", storage, b, g) for b, g in every)
