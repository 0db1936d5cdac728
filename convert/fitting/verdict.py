"""Say whether an artifact fits a target: yes, tight or no, with the largest context by one rule for every engine."""

from __future__ import annotations

from dataclasses import dataclass

from mmquant.errors import InputError

from ..models.geometry import Geometry
from . import memory
from .catalog import FOLDER, GGUF, MLX, Row
from .placement import Placement, place_llama, place_mlx, place_vllm
from .speed import tokens_per_second
from .targets import Target
from .weights import Weights

YES, TIGHT, NO = "yes", "tight", "no"
CACHES = {GGUF: ("f16", "q8_0", "q4_0"), MLX: ("f16",)}  # the others: f16, fp8
ENGINE_OF = {GGUF: "llama.cpp", MLX: "mlx_lm", FOLDER: "vllm"}
NO_CUDA = "its kernels need CUDA"


@dataclass(frozen=True)
class Fit:
    """One row of the table on one target. context: 0 for no; tokens_per_second: a bound, 0 for no.

    missing: bytes that the devices lack; reason: why no engine runs it there, whatever the bytes.
    """

    row: Row
    target: Target
    weights: Weights
    verdict: str
    context: int
    placement: Placement
    tokens_per_second: float
    missing: int
    reason: str


def place(row: Row, weights: Weights, g: Geometry, target: Target, context: int, cache: str) -> Placement:
    """Where a row's bytes lie on a target under the engine of its family."""
    if (engine := ENGINE_OF[row.family]) not in target.engines:
        return Placement(engine, context, cache, (), reason=f"{engine} is not for this machine")
    if row.family == GGUF:
        return place_llama(weights, g, target, context, cache)
    if row.family == MLX:
        return place_mlx(weights, g, target, context, cache)
    if row.cuda and target.cards is not None and target.cards.amd:
        return Placement("vllm", context, cache, (), tensor_parallel=target.cards.count, reason=NO_CUDA)
    return place_vllm(weights, g, target, context, cache, row.group)


def fit(
    row: Row,
    g: Geometry,
    target: Target,
    *,
    context: int | None = None,
    cache: str = "f16",
    weights: Weights | None = None,
) -> Fit:
    """How a row (of its own bytes, or `weights`) fits a target, at one context or at the largest that fits.

    Largest: of 8K, 16K, 32K, 64K, 96K, 128K, 192K the largest that leaves 1 GiB free on each device (yes); where none
    does, 8K if it fits at all (tight).
    """
    weights = weights or row.weigh(g)
    found = _best(row, weights, g, target, context, cache)
    lacks = bool(found.reason) or found.margin < 0
    verdict = NO if lacks else YES if found.margin >= memory.FREE else TIGHT
    speed = 0.0 if lacks else tokens_per_second(weights, g, target, found)
    return Fit(row, target, weights, verdict, 0 if lacks else found.context, found, speed, found.missing, found.reason)


def _best(row: Row, weights: Weights, g: Geometry, target: Target, context: int | None, cache: str) -> Placement:
    if context is not None:
        return place(row, weights, g, target, context, cache)
    tried = memory.contexts_of(g)
    for size in reversed(tried):
        found = place(row, weights, g, target, size, cache)
        if found.reason or found.margin >= memory.FREE:
            return found
    return place(row, weights, g, target, tried[0], cache)


def check_context(context: int | None, g: Geometry) -> None:
    """InputError for a context that the model does not have."""
    if context is not None and not 1 <= context <= g.max_context:
        raise InputError(f"--context {context}: expected 1 to {g.max_context}, the model's maximum")


def cache_of(row: Row, wanted: str | None, own: str = "f16") -> str:
    """The cache type of a row: what was asked for where its engine has it, else its own."""
    known = CACHES.get(row.family, ("f16", "fp8"))
    if wanted is None:
        return own
    near = {"fp8": "q8_0", "q8_0": "fp8", "q4_0": "fp8"}.get(wanted, wanted)
    return wanted if wanted in known else near if near in known else own
