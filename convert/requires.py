"""What an artifact asks of an engine beyond its format: tensor parallelism that loads, versions that do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .models.geometry import Geometry

PARALLEL = (1, 2, 4, 8)
FP8_TILE = 128
NO_CHANNELS = "vLLM 0.26 does not load INT4 experts with one scale a row (group size -1); 0.33 does"


def parallel_allowed(g: Geometry, group: int) -> list[int]:
    """Tensor parallel sizes at which no group of `group` inputs of w2 straddles two devices; -1: any that divides."""
    split = [p for p in PARALLEL if g.expert_width % p == 0]
    return split if group == -1 else [p for p in split if (g.expert_width // p) % group == 0]


def requires(run: Mapping[str, Any], g: Geometry) -> dict[str, Any]:
    """The manifest's `requires` of a run that wrote a folder; empty where nothing is known."""
    group = FP8_TILE if run.get("command") == "fp8" and run.get("scheme") != "channel" else run.get("group_size")
    if not isinstance(group, int):
        return {}
    found: dict[str, Any] = {"tensor_parallel_allowed": parallel_allowed(g, group)}
    if group == -1:
        found |= {"engines": {"vllm": ">=0.33"}, "known_bad": [NO_CHANNELS]}
    return found


def notes(run: Mapping[str, Any], g: Geometry) -> list[str]:
    """What the user should know before such an artifact is written."""
    return list(requires(run, g).get("known_bad", []))
