"""Second and cross moments of two streams, the pool of a layer's experts, and the correction from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ...quantize.ggml.factor import Factor
from ...quantize.ggml.scalar.columns import has_triton
from ...quantize.linear_algebra import full_float32
from ..model.distributed import rank_share, sum_everywhere, sum_to_owners, world
from .held import Held
from .moments_cuda import add_sorted, complete

PRIOR = 16.0  # strength of the pooled moments, in rows per input (quantize/moments.py)
# Ridge of both moments, as shares of the mean diagonal: for text of another kind, and at one row per input.
FLOOR, SAMPLING = 0.2, 6.0
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Pool:
    """Mean own and cross moments [n, n] of all matrices of a layer, each at unit energy.

    level (): their mean energy; weight, rows [E]: what each of them saw
    """

    own: Tensor
    cross: Tensor
    level: Tensor
    weight: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Lacking:
    """What the quantized stream lacks by token [N, H] float32, and the tokens of rows [R]; None: rows are tokens."""

    hidden: Tensor
    token: Tensor | None = None

    def rows(self, part: slice | Tensor) -> Tensor:
        """[R, H] of some rows."""
        return self.hidden[part if self.token is None else self.token[part]]


@dataclass(frozen=True)
class Pair:
    """Raw sums over rows for E matrices of n inputs: own [E, n, n] of z z^T, cross [E, n, n] of x z^T.

    weight and rows are [E]. `pool`: of all matrices of the layer when these are only some of them; `held`: rows that
    are in no sum; `drift` [E, O, n]: d z^T, what the residual stream lacks where these matrices add to it. owned: the
    matrices whose sums and held-out rows are whole on this rank (`over_ranks`); None: all. fused: rows are added by
    moments_cuda.py, and the moments are whole after `over_ranks` alone.
    """

    own: Tensor
    cross: Tensor
    weight: Tensor
    rows: Tensor
    pool: Pool | None = None
    held: Held | None = None
    drift: Tensor | None = None
    owned: range | None = None
    fused: bool = False

    @classmethod
    def empty(
        cls,
        matrices: int,
        inputs: int,
        device: torch.device | str,
        outputs: int = 0,
        rows: torch.dtype = torch.float32,
    ) -> Pair:
        """No rows yet; outputs: O of `drift`, 0 for matrices that do not add to the residual stream; rows: of dtype."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        square, held = (matrices, inputs, inputs), Held.empty(matrices, inputs, device, outputs)
        drift = zeros(matrices, outputs, inputs) if outputs else None
        fused = torch.device(device).type == "cuda" and rows == torch.bfloat16 and has_triton()
        sums = zeros(*square), zeros(*square), zeros(matrices), zeros(matrices)
        return cls(*sums, held=held, drift=drift, fused=fused)

    def add(self, matrix: int, x: Tensor, z: Tensor, share: Tensor | None = None, d: Tensor | None = None) -> None:
        """Rows x, z [R, n] (and d [R, O], what the stream lacks) of one matrix, each counted by share^2 [R]."""
        assert not self.fused, "its sums are whole after add_sorted alone"
        if not len(x):
            return
        whole = x.dtype != torch.bfloat16  # sums over bfloat16 rows lose nothing that counts in TF32
        weight = torch.ones(len(x), device=x.device) if share is None else share.float()
        x, z = (rows.float() * weight.unsqueeze(1) for rows in (x, z))
        d = None if d is None else d * weight.unsqueeze(1)
        if self.held is not None:
            out, places = self.held.choose([0, len(x)], matrix)
            self.held.fill(places, x[out], z[out], None if d is None else d[out])
            x[out], z[out], weight[out] = 0.0, 0.0, 0.0
        with full_float32(whole):
            self.own[matrix].addmm_(z.T, z)
            self.cross[matrix].addmm_(x.T, z)
        if self.drift is not None and d is not None:
            with full_float32(False):  # a regression of small numbers
                self.drift[matrix].addmm_(d.T, z)
        self.weight[matrix] += weight.square().sum()
        self.rows[matrix] += (weight != 0).sum()

    def add_sorted(
        self,
        x: Tensor,
        z: Tensor,
        offsets: list[int],
        share: Tensor | None = None,
        scale: Tensor | None = None,
        lacking: Lacking | None = None,
    ) -> None:
        """Rows [R, n] sorted by matrix, matrix e owning offsets[e]:offsets[e+1]; x times `scale` [E], powers of two."""
        if self.fused:
            add_sorted(self, x, z, offsets, share, scale, lacking)
            return
        for matrix, (start, stop) in enumerate(pairwise(offsets)):
            part = slice(start, stop)
            rows = x[part] if scale is None else x[part] * scale[matrix].to(x.dtype)
            some, lost = None if share is None else share[part], None if lacking is None else lacking.rows(part)
            self.add(matrix, rows, z[part], some, lost)

    def over_ranks(self) -> Pair:
        """The sums of all ranks, in rank order: a single matrix's on every rank, several matrices' with their owners.

        Rank r owns the matrices `rank_share(E, r, size)`; weight and rows are whole everywhere. Changed in place.
        """
        if self.fused:
            complete(self)
        rank, size = world()
        if size == 1:
            return self
        held, several = self.held, len(self.own) > 1
        parts = [self.own, self.cross, self.drift, *((held.x, held.z, held.d) if held is not None else ())]
        for part in parts:
            if part is not None and several:
                sum_to_owners(part)
            elif part is not None:
                part.copy_(sum_everywhere(part))
        if held is not None:
            counts = torch.tensor([held.met, held.count], device=self.own.device)
            met, count = sum_everywhere(counts).tolist()
            held = replace(held, met=met, count=count)
        owned = rank_share(len(self.own), rank, size) if several else None
        weight, rows = sum_everywhere(self.weight), sum_everywhere(self.rows)
        return replace(self, weight=weight, rows=rows, held=held, owned=owned)

    def energy(self) -> Tensor:
        """[E] mean square of an input."""
        return self.own.diagonal(dim1=1, dim2=2).mean(1) / self.weight.clamp(min=TINY)

    def pooled(self) -> Pair:
        """The same sums with their pool: their own matrices' unless it is there."""
        if self.pool is not None:
            return self
        sums = PoolSums()
        sums.add(self)
        return replace(self, pool=sums.result())

    def outputs(self, rows: slice) -> Pair:
        """The same for some outputs of the matrices alone."""
        drift = None if self.drift is None else self.drift[:, rows]
        return replace(self, drift=drift, held=None if self.held is None else self.held.outputs(rows))

    def mean_drift(self, chosen: slice, prior: float = PRIOR) -> Tensor | None:
        """Mean drift [E, O, n] of some matrices; none of it where rows are few."""
        if self.drift is None:
            return None
        pool = self.pooled().pool
        assert pool is not None
        others = prior * self.own.shape[-1] * (len(pool.rows) > 1)
        known = self.rows[chosen] / (self.rows[chosen] + others).clamp(min=1.0)
        return self.drift[chosen] * (known / self.weight[chosen].clamp(min=TINY)).view(-1, 1, 1)

    def means(
        self, chosen: slice, prior: float = PRIOR, floor: float = FLOOR, sampling: float = SAMPLING
    ) -> tuple[Tensor, Tensor]:
        """Mean own and cross moments of some matrices, blended with the pooled ones where rows are few.

        The pool counts as `prior` * n rows of average weight and average energy. What is off the diagonal is noise
        where rows are few, and partly the text's own where they are many: both moments get a ridge of floor + sampling
        * n / rows of the mean diagonal (at most 1). So feedback and correction do less than this text alone would have.
        """
        pool = self.pooled().pool
        assert pool is not None
        n, weight = self.own.shape[-1], self.weight[chosen]
        pool_weight = prior * n * pool.weight.sum() / pool.rows.sum().clamp(min=1.0)
        share = (pool_weight / (weight + pool_weight).clamp(min=TINY)).view(-1, 1, 1)
        level = torch.where(weight > 0, self.energy()[chosen], pool.level).view(-1, 1, 1)
        divisor = weight.clamp(min=TINY).view(-1, 1, 1)
        own, cross = (
            torch.lerp(sums[chosen] / divisor, level * shared, share)
            for sums, shared in ((self.own, pool.own), (self.cross, pool.cross))
        )
        rows = self.rows[chosen] + prior * n * (len(pool.rows) > 1)
        ridge = (floor + sampling * n / rows.clamp(min=1.0)).clamp(max=1.0) * own.diagonal(dim1=1, dim2=2).mean(1)
        for part in (own, cross):
            part.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
        return own, cross


class PoolSums:
    """The pool of a layer's matrices, added one after the other: the same bits however they come in chunks."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._energy: list[Tensor] = []
        self._weight: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._parted = False

    def add(self, pair: Pair) -> None:
        """The next matrices of the layer; of those that are with other ranks they have the sums."""
        energy, owned = pair.energy(), pair.owned
        if owned is not None:
            self._parted = True
            mine = torch.zeros_like(energy)
            mine[owned.start : owned.stop] = energy[owned.start : owned.stop]
            energy = sum_everywhere(mine)
        # At unit energy, a loud expert does not drown the others.
        share = (pair.weight > 0) / energy.clamp(min=TINY) / pair.weight.clamp(min=TINY)
        if not self._sums:
            self._sums = [torch.zeros_like(pair.own[0]), torch.zeros_like(pair.cross[0])]
        for total, part in zip(self._sums, (pair.own, pair.cross), strict=True):
            for matrix in range(len(part)) if owned is None else owned:
                total.addcmul_(part[matrix], share[matrix])
        self._energy.append(energy)
        self._weight.append(pair.weight)
        self._rows.append(pair.rows)

    def result(self) -> Pool:
        """The pool of all that was added."""
        energy, weight, rows = (torch.cat(parts) for parts in (self._energy, self._weight, self._rows))
        seen = (weight > 0).sum().clamp(min=1)
        own, cross = (sum_everywhere(part) if self._parted else part for part in self._sums)
        return Pool(own / seen, cross / seen, energy.sum() / seen, weight, rows)


def each_pooled(chunks: list[range], collect: Callable[[range], Pair], use: Callable[[range, Pair], None]) -> Tensor:
    """`use` the sums of every chunk of matrices with the pool of all; only one chunk's are held at a time.

    One chunk is collected once; several twice, for the pool and for use. Returns the rows that each matrix saw [E].
    """
    if len(chunks) == 1:
        pair = collect(chunks[0]).pooled()
        use(chunks[0], pair)
        return pair.rows
    sums = PoolSums()
    for kept in chunks:
        sums.add(collect(kept))
    pool = sums.result()
    for kept in chunks:
        use(kept, replace(collect(kept), pool=pool))
    return pool.rows


def corrected(weight: Tensor, own: Tensor, cross: Tensor, known: Factor, drift: Tensor | None = None) -> Tensor:
    """T = (W (X + l) + D) (H + l)^-1 for weight [E, O, n], D the mean drift: W + (W (X - H) + D) (H + l)^-1.

    known: H + l factored; W itself where that needed more damping.
    """
    with full_float32(False):  # of what is added alone
        change = weight @ (cross - own)
    change = known.divide(change if drift is None else change.add_(drift))
    good = known.good & torch.isfinite(change).flatten(1).all(1)
    return torch.where(good.view(-1, 1, 1), weight + change, weight)
