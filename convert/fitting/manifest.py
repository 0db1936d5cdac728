"""The targets of a manifest (mmquant.fit.json): verdict, budget and commands of one artifact on every machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..hub.layout import split_of
from ..models.geometry import Geometry
from . import memory
from .catalog import FOLDER, GGUF, MLX, Row
from .commands import Command, commands, override_tensor
from .requires import group_of
from .targets import Target, read_targets
from .verdict import NO, Fit, fit
from .weights import Weights

ANYWHERE = ("fp8", "bf16")  # commands whose kernels are not CUDA's alone
FAMILIES = {"gguf": GGUF, "mlx": MLX}


def target_blocks(
    artifact: str,
    storage: str,
    entry: str,
    weights: Weights,
    g: Geometry,
    run: Mapping[str, Any],
    targets: Sequence[Target] | None = None,
    context: int | None = None,
) -> list[dict[str, Any]]:
    """One block for each machine (by default of the package's table), in the schema's form.

    context: tokens that must fit; None: the largest that does. What does not fit has no command.
    """
    parts, found = split_of(entry)[2] if storage == "gguf" else 1, list[dict[str, Any]]()
    for target in targets if targets is not None else read_targets().values():
        fits = fit_of(artifact, storage, weights, g, run, target, context)
        lines = commands(fits, g.architecture, entry, parts)
        found.append(_block(artifact, fits, g, target, lines))
    return found


def fit_of(
    artifact: str,
    storage: str,
    weights: Weights,
    g: Geometry,
    run: Mapping[str, Any],
    target: Target,
    context: int | None = None,
) -> Fit:
    """How an artifact fits a machine. run: what its manifest says of how it was made."""
    row = Row(artifact, FAMILIES.get(storage, FOLDER), storage, (), lambda _: weights, group_of(run), _needs_cuda(run))
    return fit(row, g, target, context=context, cache=cache_of_run(run))


def cache_of_run(run: Mapping[str, Any]) -> str:
    """Type of the KV cache that engines take by themselves: they follow the folder's kv_cache_scheme."""
    return "fp8" if run.get("kv_cache") == "fp8" else "f16"


def _needs_cuda(run: Mapping[str, Any]) -> bool:
    return run.get("command") not in ANYWHERE


def _block(artifact: str, fits: Fit, g: Geometry, target: Target, lines: list[Command]) -> dict[str, Any]:
    place = fits.placement
    own = {"llama.cpp": "computed"}.get(place.engine, "estimated")
    bases = {"weights": "exact", "kv": "computed", "compute": own}
    bases |= {"staging": "estimated", "runtime": "estimated", "tokens_per_second_bound": "estimated"}
    block: dict[str, Any] = {
        "id": target.id,
        "artifact": artifact,
        "engine": place.engine,
        "hardware": _hardware(target),
        "fits": fits.verdict,
        "context_tokens": fits.context,
        "kv_cache_type": place.cache,
        "parallel_sequences": 1,
        "placement": _placement(fits),
        "budget": [device.row() for device in place.devices],
        "basis": "estimated",
        "bases": bases,
        "launch": _launch(lines[0]) if lines else {"argv": []},
        "alternatives": [{"engine": c.engine, "note": c.note, **_launch(c)} for c in lines[1:]],
    }
    if fits.verdict == NO:
        return block | {"missing": fits.missing, "reason": fits.reason}
    return block | {"tokens_per_second_bound": round(fits.tokens_per_second, 1)}


def _launch(command: Command) -> dict[str, Any]:
    return {"argv": list(command.argv), "env": command.env}


def _hardware(target: Target) -> dict[str, Any]:
    gpus = []
    if (cards := target.cards) is not None:
        gpus = [{"name": cards.name, "count": cards.count, "memory": cards.memory, "usable": cards.usable}]
    return {"gpus": gpus, "host_ram": target.ram, "unified": target.unified}


def _placement(fits: Fit) -> dict[str, Any]:
    place = fits.placement
    if place.engine == "llama.cpp":
        split = {"tensor_split": list(place.split)} if place.split else {}
        over = {"override_tensor": override_tensor(fits)} if place.cpu_layers else {}
        return {"n_cpu_moe": place.cpu_layers, **split, **over}
    if place.engine == "vllm":
        found = {"tensor_parallel": place.tensor_parallel, "expert_parallel": place.expert_parallel}
        return {**found, "gpu_memory_utilization": memory.VLLM_SHARE}
    return {}
