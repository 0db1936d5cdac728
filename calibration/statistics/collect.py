"""What a calibration pass collects."""

from __future__ import annotations

from dataclasses import dataclass

from mmquant.errors import InputError


@dataclass(frozen=True)
class Collect:
    """What to collect.

    full           second moments [n, n]; otherwise diagonals only
    weighting      "router": rows count by their squared router weight; "uniform": all alike
    experts        "routed": each expert sees the tokens routed to it; "all": every expert sees every token, unweighted
    skip_nonfinite leave out rows with NaN or infinity (and count them) instead of stopping with ValueError
    """

    full: bool = True
    weighting: str = "router"
    experts: str = "routed"
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.weighting not in ("router", "uniform"):
            raise InputError(f"weighting {self.weighting!r}, expected router or uniform")
        if self.experts not in ("routed", "all"):
            raise InputError(f"experts {self.experts!r}, expected routed or all")
