"""Bound decode speed by memory bandwidth: every token reads what it is multiplied with once. An estimate from above."""

from __future__ import annotations

from ..models.geometry import Geometry
from .placement import Device, Placement
from .targets import Target
from .weights import Weights


def tokens_per_second(weights: Weights, g: Geometry, target: Target, placement: Placement) -> float:
    """Tokens a second of one sequence at an empty cache, by the bandwidths of the data sheets; never reached.

    Cards of one layer split work one after the other, those of tensor parallelism together.
    """
    share = g.experts_per_token / g.experts
    cards = [device for device in placement.devices if device.name.startswith("gpu")]
    others = [device for device in placement.devices if not device.name.startswith("gpu")]
    at_once = 1 if placement.engine == "llama.cpp" else max(1, len(cards))
    seconds = 0.0
    if target.cards is not None:
        seconds += sum(_read(device, share) for device in cards) / at_once / target.cards.bandwidth
    seconds += sum(_read(device, share) - _unread(device, weights) for device in others) / target.ram_bandwidth
    return 1 / seconds if seconds > 0 else 0.0


def _read(device: Device, share: float) -> float:
    """Bytes of a device that one token reads."""
    return device.weights - device.experts + device.experts * share


def _unread(device: Device, weights: Weights) -> int:
    """The embedding table, of which one row is read."""
    return min(weights.embedding, device.weights - device.experts)
