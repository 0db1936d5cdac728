"""Refuse weights that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from mmquant.errors import InputError


def check_finite(weight: Tensor) -> None:
    """InputError for a weight with NaN or infinity."""
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"weight {tuple(weight.shape)} holds NaN or infinity, expected finite values")
