"""What config.json of a MiniMax-M2 checkpoint must say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmquant.errors import InputError

from ...files.parse import is_list, short
from .. import geometry as base
from ..architecture import Architecture


@dataclass(frozen=True)
class Geometry(base.Geometry):
    """Sizes of a MiniMax-M2 checkpoint."""

    @property
    def architecture(self) -> Architecture:
        """The row of MiniMax-M2."""
        from .row import ARCHITECTURE

        return ARCHITECTURE

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Geometry:
        """Read config.json of the release (or of transformers 5, which moves rope into `rope_parameters`).

        Raises InputError naming the key that is missing or malformed. `models.architecture_of` has chosen this class.
        """
        check_scoring(config)
        check_variants(config)
        geometry = cls(**base.read_sizes(config, "num_local_experts", "intermediate_size"))
        geometry.check()
        return geometry


def check_scoring(config: dict[str, Any]) -> None:
    """InputError unless the router scores as MiniMax-M2's does."""
    scoring = config.get("scoring_func", "sigmoid")
    if scoring != "sigmoid":
        raise InputError(f"config.json: scoring_func is {short(scoring)}, expected sigmoid")


def check_variants(config: dict[str, Any]) -> None:
    """InputError for a relative of MiniMax-M2 whose layers compute something else: the tensors alone do not tell."""
    if config.get("use_qk_norm") not in (None, True):
        raise InputError(f"config.json: use_qk_norm is {short(config['use_qk_norm'])}, expected true")
    kinds = config.get("attn_type_list")
    if kinds is not None and (not is_list(kinds) or any(kind != 1 for kind in kinds)):
        raise InputError(f"config.json: attn_type_list is {short(kinds)}, expected 1 (full attention) for every layer")
