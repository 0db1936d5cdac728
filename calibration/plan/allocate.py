"""From sensitivities and budgets to the type of every tensor of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmquant.errors import FitError
from mmquant.tables import gib

from ...convert.gguf.mixes import tensor_bytes
from ...convert.gguf.names import EXPERT_TENSORS, TOKEN_EMBD
from ...convert.gguf.writer import padded
from ...convert.models.geometry import Geometry
from .groups import SLOW_ON_CPU, group_of, group_shapes, kinds_of
from .knapsack import CARD, HOST, Option, choose, smallest, undominated
from .sensitivity import Measured

SLOW = 0.15  # of its KLD is added to a type that is slow on a CPU, where a CPU multiplies it


@dataclass(frozen=True)
class Allocation:
    """types by tensor; bytes of their data (padded as in the file); predicted KLD; layers whose experts lie in RAM."""

    types: dict[str, str]
    bytes: int
    kld: float
    host_layers: int | None = None


def options_of(g: Geometry, groups: Mapping[str, Measured], host: bool = False) -> dict[str, list[Option]]:
    """Every tensor's choices. host: experts may lie on the host as well as on the card, embeddings lie on the host."""
    experts = {group_of(layer, name) for layer in range(g.layers) for name in EXPERT_TENSORS}
    found: dict[str, list[Option]] = {}
    for name, shape in group_shapes(g).items():
        options: list[Option] = []
        for kind in kinds_of(name, shape[-1]):
            size, cost = padded(tensor_bytes(kind, shape)), groups[name].cost(kind)
            places = (CARD, HOST) if host and name in experts else (HOST,) if host and name == TOKEN_EMBD else (CARD,)
            for place in places:
                slow = SLOW if place == HOST and name in experts and kind in SLOW_ON_CPU else 0.0
                options.append(Option(kind, size, cost * (1 + slow), place))
        found[name] = undominated(options)
    return found


def allocate(g: Geometry, groups: Mapping[str, Measured], budget: int) -> Allocation:
    """The least predicted KLD within `budget` bytes of tensor data. FitError that names the smallest that works."""
    return cheapest(options_of(g, groups), groups, budget)


def cheapest(options: Mapping[str, Sequence[Option]], groups: Mapping[str, Measured], budget: int) -> Allocation:
    """The same for any choices of any groups."""
    least = smallest(options)
    chosen = choose(options, [budget]) if budget >= least else None
    if chosen is None:
        raise FitError(f"{budget:,} bytes for matrices: the smallest types take {least:,} ({least / 1e9:.3f} GB)")
    return _allocation(groups, chosen, None)


def allocate_placed(g: Geometry, groups: Mapping[str, Measured], card: int, host: int) -> Allocation:
    """The same with a card and the host's RAM: experts of the first layers in RAM, embeddings too, the rest there.

    FitError that says how much is missing.
    """
    options = options_of(g, groups, host=True)
    layers = [[group_of(layer, name) for name in EXPERT_TENSORS] for layer in range(g.layers)]
    chosen = choose(options, [card, host], layers) if min(card, host) >= 0 else None
    if chosen is None:
        raise FitError(_missing(options, layers, card, host))
    in_ram = sum(chosen[names[0]].place == HOST for names in layers)
    return _allocation(groups, chosen, in_ram)


def _missing(options: Mapping[str, list[Option]], layers: Sequence[Sequence[str]], card: int, host: int) -> str:
    """How far the smallest types are from fitting: the card's own part, and RAM with the card as full as it gets."""
    fixed = sum(min(o.bytes for o in choices) for choices in options.values() if all(o.place == CARD for o in choices))
    if fixed > card:
        return f"card: {gib(card)} are left for weights, attention and head take at least {gib(fixed)}"
    in_ram = {name: [replace(o, cost=float(o.bytes * (o.place == HOST))) for o in c] for name, c in options.items()}
    least = choose(in_ram, [card, 1 << 62], layers) or {}
    need = sum(option.bytes for option in least.values() if option.place == HOST)
    return f"RAM: {gib(host)} are left for weights, the smallest types take {gib(need)} beside the card"


def _allocation(groups: Mapping[str, Measured], chosen: Mapping[str, Option], in_ram: int | None) -> Allocation:
    types = {name: option.kind for name, option in chosen.items()}
    kld = sum(groups[name].cost(kind) for name, kind in types.items())
    return Allocation(types, sum(option.bytes for option in chosen.values()), kld, in_ram)
