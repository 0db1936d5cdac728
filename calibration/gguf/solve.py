"""Round matrices of a GGUF file: correct them for earlier errors, then quantize with error feedback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import InputError
from mmquant.monitor import PLAIN, RESCUED, UNSEEN

from ...convert.checkpoints.batches import to_host
from ...quantize.ggml.codebook import ldlq as iquant_feedback
from ...quantize.ggml.codec import decode, encode
from ...quantize.ggml.factor import Factor, factor_moments
from ...quantize.ggml.scalar import ldlq as feedback
from ...quantize.ggml.scalar.grid import FORMS
from ...quantize.ggml.types import GGMLType
from .held import Held
from .memory import WEIGHT_COPIES, solve_bytes, solve_memory
from .moments import FLOOR, PRIOR, SAMPLING, Pair, corrected

PLAIN_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)


@dataclass(frozen=True)
class Method:
    """How a matrix is rounded.

    feedback  error feedback under the second moments; otherwise a search weighted by their diagonal
    correct   let each matrix make good what the layers before it lost
    repair    so do the router and the head
    residual  what adds to the residual stream also makes good what the stream itself lacks there
    passes    rounds of coordinate descent after the sweep
    damping   share of the mean diagonal added to the moments
    prior     strength of the pooled moments; floor, sampling: ridge of the moments (Pair.means)
    """

    feedback: bool = True
    correct: bool = True
    repair: bool = True
    residual: bool = True
    passes: int = 2
    damping: float = 0.05
    prior: float = PRIOR
    floor: float = FLOOR
    sampling: float = SAMPLING

    def drift(self, pair: Pair, chosen: slice) -> Tensor | None:
        """Mean drift that matrices make good, where they add to the residual stream."""
        return pair.mean_drift(chosen, self.prior) if self.residual else None

    def moments(self, pair: Pair, chosen: slice) -> tuple[Tensor, Tensor]:
        """Mean own and cross moments with this method's regularization."""
        return pair.means(chosen, self.prior, self.floor, self.sampling)


METHODS = {
    "fast": Method(feedback=False, correct=False, passes=0),
    "default": Method(),
    "high": Method(),  # on more text (runs/gguf.py)
}


@dataclass
class Report:
    """What a run did beyond rounding.

    Powers of rescaled experts by (layer, expert), experts that saw no token, and by layer and tensor the experts that
    were rounded plainly, since error feedback was worse on held-out rows.
    """

    rescaled: dict[tuple[int, int], int] = field(default_factory=dict)
    unseen: set[tuple[int, int]] = field(default_factory=set)
    plain: dict[tuple[int, str], list[int]] = field(default_factory=dict)

    def counts(self, layer: int) -> dict[str, int]:
        """How many of each kind of finding that a run adds up."""
        plain = sum(len(experts) for (place, _), experts in self.plain.items() if place == layer)
        places = (self.rescaled, self.unseen)
        rescued, unseen = (sum(place == layer for place, _ in found) for found in places)
        return {RESCUED: rescued, UNSEEN: unseen, PLAIN: plain}

    def of_layer(self, layer: int) -> Iterator[str]:
        """What the user should know of a layer, a line each."""
        rescaled = [f"{expert} (2^{k})" for (place, expert), k in sorted(self.rescaled.items()) if place == layer]
        unseen = [str(expert) for place, expert in sorted(self.unseen) if place == layer]
        if rescaled:
            yield f"layer {layer}: experts {', '.join(rescaled)} rescaled, their sums would overflow float16 on CUDA"
        for (place, name), experts in self.plain.items():
            if place == layer and experts:
                numbers = ", ".join(map(str, experts))
                whose = f" of expert{'s' * (len(experts) > 1)} {numbers}" if name.endswith("_exps") else ""
                yield f"layer {layer}: {name}{whose} rounded without error feedback, which held-out rows say is worse"
        if unseen:
            yield f"layer {layer}: experts {', '.join(unseen)} saw no token, the layer's pooled moments stand in"


def solve(
    weight: Tensor,
    kind: GGMLType,
    pair: Pair,
    method: Method,
    step: int | None = None,
    plain: list[int] | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Bytes [E, O, b] uint8 and values [E, O, n] (of weight's dtype) of E matrices [E, O, n], `step` at a time.

    plain takes those that were rounded without feedback after all.
    """
    experts, rows, n = weight.shape
    out, values, pair = np.empty((experts, rows, kind.row_bytes(n)), np.uint8), torch.empty_like(weight), pair.pooled()
    step = step if step is not None else experts_at_once(weight)
    for start in range(0, experts, step):
        part = slice(start, start + step)
        stored, values[part], worse = rounded_part(weight[part], kind, pair, part, method)
        out[part] = to_host(stored).numpy()
        if plain is not None:
            plain += [start + expert for expert in worse[:, 0].nonzero().flatten().tolist()]
    return out, values


def experts_at_once(weight: Tensor) -> int:
    """How many of E matrices [E, O, n] are solved together: as many as the device's working memory holds."""
    _, rows, n = weight.shape
    return max(1, solve_memory(weight.device) // solve_bytes(rows, n))


def rows_at_once(weight: Tensor) -> int:
    """Rows of one matrix [..., O, n] that the working memory holds beside its moments; 256 at least."""
    n = weight.shape[-1]
    return max(256, (solve_memory(weight.device) - solve_bytes(0, n)) // (4 * WEIGHT_COPIES * n))


def rounded_part(
    weight: Tensor,
    kind: GGMLType,
    pair: Pair,
    part: slice,
    method: Method,
    matrices: int = 1,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes [E, O, b] uint8 and values [E, O, n] float32 of the matrices `part` of a pair, all at once.

    Also [E, matrices] which were rounded plainly after all (Held.worse); matrices: how many are stacked by rows; share
    [E, matrices]: of the correction, where it is known (else held-out rows say).
    """
    none = torch.zeros(len(weight), matrices, dtype=torch.bool, device=weight.device)
    if kind in PLAIN_TYPES:
        stored = encode(weight.float().flatten(0, 1), kind).view(*weight.shape[:2], -1)
        values = decode(stored.flatten(0, 1), kind, weight.shape[2]).view_as(weight)
        return stored, values, none
    block = rows_at_once(weight)
    if len(weight) == 1 and block < weight.shape[1] and matrices > 1:  # larger than the working memory
        each = weight.shape[1] // matrices
        rows = [slice(start, start + each) for start in range(0, weight.shape[1], each)]
        pieces = [rounded_part(weight[:, r], kind, pair.outputs(r), part, method) for r in rows]
        data, values, plain = zip(*pieces, strict=True)
        return torch.cat(data, 1), torch.cat(values, 1), torch.cat(plain, 1)
    if len(weight) == 1 and block < weight.shape[1]:
        share = correction_share(weight, block, pair, part, method)
        blocks = [slice(start, start + block) for start in range(0, weight.shape[1], block)]
        pieces = [rounded_part(weight[:, b], kind, pair.outputs(b), part, method, share=share) for b in blocks]
        data, values, plain = zip(*pieces, strict=True)
        return torch.cat(data, 1), torch.cat(values, 1), torch.stack(plain).any(0)
    own, cross = method.moments(pair, part)
    if not bool(torch.isfinite(own.diagonal(dim1=1, dim2=2)).all()):
        raise InputError("its input holds NaN or infinity in the calibration pass, expected finite activations")
    exact = target = weight.float()
    held = pair.held if method.feedback else None
    known = factor_moments(own, method.damping) if method.feedback or method.correct else None
    if method.correct and known is not None:
        target = corrected(exact, own, cross, known, method.drift(pair, part))
        if held is not None and share is None:
            share = held.share(part, held.agreement(part, exact, target, matrices))
        if share is not None:
            target = exact + share.repeat_interleave(weight.shape[1] // matrices, 1).unsqueeze(2) * (target - exact)
    stored = _rounded(target, kind, own, known, method)
    values = decode(stored.flatten(0, 1), kind, weight.shape[2]).view_as(target)
    if held is not None:
        none = replace_worse(exact, kind, (held, part), own, (stored, values), matrices)
    return stored, values, none


def correction_share(weight: Tensor, block: int, pair: Pair, part: slice, method: Method) -> Tensor | None:
    """[E, 1] share of the correction that held-out rows confirm, of a matrix [1, O, n] taken `block` rows at a time."""
    held = pair.held
    if held is None or not (method.correct and method.feedback):
        return None
    own, cross = method.moments(pair, part)
    known, sums = factor_moments(own, method.damping), torch.zeros(2, 1, 1, device=held.x.device)
    for start in range(0, weight.shape[1], block):
        few = slice(start, start + block)
        some, exact = pair.outputs(few), weight[:, few].float()
        target = corrected(exact, own, cross, known, method.drift(some, part))
        assert some.held is not None
        sums += some.held.agreement(part, exact, target)
    return held.share(part, sums)


def replace_worse(
    weight: Tensor,
    kind: GGMLType,
    rows: tuple[Held, slice],
    own: Tensor,
    made: tuple[Tensor, Tensor],
    matrices: int,
) -> Tensor:
    """Round plainly, under the diagonal of `own`, what held-out rows say errs more than that; which [E, matrices].

    made: bytes [E, O, b] and values [E, O, n], changed in place.
    """
    held, part = rows
    diagonal = own.diagonal(dim1=1, dim2=2)
    worse = held.worse(part, weight, made[1], kind, diagonal, matrices)
    each = weight.shape[1] // matrices
    for expert, matrix in worse.nonzero().tolist():
        some = slice(matrix * each, (matrix + 1) * each)
        data = encode(weight[expert, some], kind, diagonal[expert].contiguous())
        made[0][expert, some], made[1][expert, some] = data, decode(data, kind, weight.shape[2])
    return worse


def _rounded(target: Tensor, kind: GGMLType, own: Tensor, known: Factor | None, method: Method) -> Tensor:
    if not method.feedback or known is None:
        diagonal = own.diagonal(dim1=1, dim2=2).contiguous()
        parts = [encode(rows, kind, weight) for rows, weight in zip(target, diagonal, strict=True)]
        return torch.stack(parts)
    if kind in FORMS:
        return feedback.encode_with_feedback(target, kind, feedback.unit_factor(known), method.passes)
    blocks = iquant_feedback.factor_blocks(known, kind)
    return iquant_feedback.encode_blocks_with_feedback(target, kind, blocks, passes=method.passes)
