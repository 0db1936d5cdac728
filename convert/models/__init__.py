"""The table of model architectures: one package each, one row here."""

from __future__ import annotations

from typing import Any

from mmquant.errors import InputError

from ..files.parse import short, take_list
from .architecture import Architecture
from .minimax_m2.row import ARCHITECTURE as MINIMAX_M2

ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in (MINIMAX_M2,)}
DEFAULT_ARCHITECTURE = MINIMAX_M2  # of a chat template without its model


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The architecture that config.json names by model_type or architectures; InputError when it is none of ours."""
    names = take_list(config, "architectures", str, "config.json", [])
    for row in ARCHITECTURES.values():
        if config.get("model_type") == row.model_type or row.class_name in names:
            return row
    found = ", ".join(names[:3]) or short(config.get("model_type") or "nothing")
    known = " or ".join(f"{row.class_name} (model_type {row.model_type})" for row in ARCHITECTURES.values())
    raise InputError(f"config.json: architecture is {found}, expected {known}")
