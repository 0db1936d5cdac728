"""Byte budgets for the weights of a machine, which is a target of `mmquant fit` or written as CARD+RAM."""

from __future__ import annotations

import re

from mmquant.errors import FitError, InputError, suggest

from ..convert.fitting.budgets import weight_budgets
from ..convert.fitting.targets import Target, known_target, machine, read_targets
from ..convert.models.geometry import Geometry

_MACHINE = re.compile(r"(?:(\d{1,2})x)?([\d.]+ ?[kmgt]?i?b?)\+([\d.]+ ?[kmgt]?i?b?)", re.IGNORECASE)


def budgets_of(target: str, g: Geometry, context: int) -> tuple[int | None, int]:
    """(bytes on the cards, bytes in RAM) for weights; (None, bytes) where card and RAM are one memory.

    InputError for a target that is none and a context that the model does not have, FitError where nothing is left.
    """
    found = target_of(target)
    check_context(context, g)
    left = weight_budgets(g, found, context)
    if left.total <= 0 or (found.cards is not None and not (left.cards and left.ram)):
        raise FitError(f"--target {target}: cache and runtime of {context} tokens leave no room for weights")
    return (None if found.cards is None else left.cards), left.ram


def check_context(context: int, g: Geometry) -> None:
    """InputError for more tokens than the model takes."""
    if context > g.max_context:
        raise InputError(f"--target-context {context}: the model has at most {g.max_context}")


def target_of(text: str) -> Target:
    """A target of the table, or CARD+RAM. InputError that names the close ones."""
    known = read_targets()
    if (found := known_target(text, known)) is not None:
        return found
    match = _MACHINE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"--target {text}: {suggest(text, known)}, or CARD+RAM such as 24GB+96GB")
    return machine(f"{match[2]}x{match[1]}" if match[1] else match[2], match[3])
