"""How widely the scales of a grid type are searched; the numbers were chosen by bench/ggml_encode.py."""

from __future__ import annotations

from dataclasses import dataclass

from .grid import Form


@dataclass(frozen=True)
class Effort:
    """The candidates of a search.

    stretches        types without minimum: levels by which the range of a sub-block is stretched (its largest magnitude
                     falls that far beyond the end level)
    other_stretches  the same with the largest magnitude at the other end, for types with one level more below zero
    range_stretches  types with a minimum: (stretch of the range in levels, levels cut off at its lower end)
    refits           rounds of nearest levels and least squares on the best candidate
    supers           offsets of the highest stored integer: the candidates of d and dmin
    rounds           rounds of refitting stored integers and d at the levels they give
    """

    stretches: tuple[float, ...] = (0.0, -0.5, -1.0, 0.5, 1.0)
    other_stretches: tuple[float, ...] = (0.0, 0.5)
    range_stretches: tuple[tuple[float, float], ...] = ((0.0, 0.0), (-0.5, 0.0), (0.5, 0.0), (1.0, 0.5))
    refits: int = 2
    supers: tuple[float, ...] = (0.0, -0.5, 0.5, -1.5, 1.5, -3.0, 3.0, -6.0)
    rounds: int = 2

    def candidates(self, form: Form) -> int:
        """How many candidates a sub-block has."""
        if form.minimums is not None:
            return len(self.range_stretches)
        both = -form.lowest > form.levels[-1]
        return len(self.stretches) + (len(self.other_stretches) if both else 0)
