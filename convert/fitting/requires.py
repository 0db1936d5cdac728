"""What an artifact asks of an engine beyond its format: tensor parallelism that loads, versions, what is known bad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..files.parse import is_object
from ..gguf.mixes import MIXES, tensor_types
from ..models.geometry import Geometry

PARALLEL = (1, 2, 4, 8)
FP8_TILE = 128
SEEN = {"vllm": ">=0.26"}  # the oldest version in which each folder format was run
CAPABILITY = {"fp8": "7.5", "int4": "7.5", "nvfp4": "7.5", "mxfp4": "8.0"}  # of CUDA, through Marlin's kernels
NO_CHANNELS = "vLLM 0.26 does not load INT4 experts with one scale a row (group size -1); 0.33 does"
ONE_SCHEME = "transformers 5.17 takes one scheme for the experts of all layers and reads others wrongly; vLLM does not"
HALF_SUMS = ("Q2_K", "Q4_1", "Q4_K", "Q5_1", "Q5_K")  # CUDA sums activations in float16 for them
NOT_SUMMED = (
    "CUDA builds of llama.cpp without GGML_CUDA_FORCE_CUBLAS may give NaN: the last layer's ffn_down_exps is {kind} "
    "and was not calibrated (mmquant doctor --fix cures the file)"
)


def group_of(run: Mapping[str, Any]) -> int:
    """Inputs that share a scale, which tensor parallelism must not cut; -1 a whole row, 0 none."""
    if run.get("command") == "fp8":
        return FP8_TILE if run.get("scheme") != "channel" else 0
    group = run.get("group_size", 0)
    return group if isinstance(group, int) else 0


def parallel_allowed(g: Geometry, group: int) -> list[int]:
    """Tensor parallel sizes at which no group of `group` inputs of down straddles two devices; -1: any that divides."""
    split = [p for p in PARALLEL if g.expert_width % p == 0]
    return split if group == -1 else [p for p in split if (g.expert_width // p) % group == 0]


def requires(run: Mapping[str, Any], g: Geometry) -> dict[str, Any]:
    """The manifest's `requires` of a run; empty where nothing is known."""
    if run.get("command") == "gguf":
        bad = _known_bad_gguf(run, g)
        return {"known_bad": bad} if bad else {}
    if run.get("command") not in CAPABILITY:
        return {}
    found: dict[str, Any] = {"engines": dict(SEEN), "cuda_capability_min": CAPABILITY[run["command"]]}
    group = group_of(run)
    if group:
        found["tensor_parallel_allowed"] = parallel_allowed(g, group)
    bad = [ONE_SCHEME] if _several_schemes(run) else []
    if group == -1:
        found |= {"engines": {"vllm": ">=0.33"}}
        bad.append(NO_CHANNELS)
    return found | ({"known_bad": bad} if bad else {})


def _several_schemes(run: Mapping[str, Any]) -> bool:
    """Whether layers' experts lie in different schemes."""
    plan: object = run.get("plan")
    return bool(run.get("eight_bit")) or (is_object(plan) and "," in str(plan.get("experts")))


def _known_bad_gguf(run: Mapping[str, Any], g: Geometry) -> list[str]:
    mix = MIXES.get(str(run.get("type")))
    if mix is None or "calibration" in run:
        return []
    name = f"blk.{g.layers - 1}.ffn_down_exps.weight"
    planned: object = run.get("plan")
    kind = str(planned[name]) if is_object(planned) and name in planned else tensor_types(mix, g)[name]
    return [NOT_SUMMED.format(kind=kind)] if kind in HALF_SUMS else []


def notes(run: Mapping[str, Any], g: Geometry) -> list[str]:
    """What the user should know before such an artifact is written."""
    return list(requires(run, g).get("known_bad", []))
