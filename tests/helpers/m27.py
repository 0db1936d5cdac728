"""The geometry of MiniMax-M2.7, and others beside it."""

from __future__ import annotations

import dataclasses

from mmquant.convert.models import architecture_of
from mmquant.convert.models.geometry import Geometry
from mmquant.convert.models.minimax_m2.release import M2_7

M27: Geometry = architecture_of(M2_7).geometry(M2_7)
PRUNED = dataclasses.replace(M27, experts=192)  # as REAP prunes a quarter of the experts
