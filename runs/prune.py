"""Choose the experts that stay: by a list, or by what calibration saw of them."""

from __future__ import annotations

from pathlib import Path

from mmquant.errors import InputError
from mmquant.monitor import current

from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.checkpoints.pruned import PrunedCheckpoint, most_salient, read_kept
from .options import PruneOptions


def pruned(source: Checkpoint, options: PruneOptions) -> Checkpoint:
    """The checkpoint with the experts that `options` asks for; itself when all stay.

    Raises InputError for a list that does not fit the model, and for statistics of another one.
    """
    if options.experts_kept is not None:
        return PrunedCheckpoint(source, read_kept(options.experts_kept))
    if options.experts is None:
        return source
    assert options.statistics is not None
    return by_saliency(source, options.experts, options.statistics)


def by_saliency(source: Checkpoint, count: int, statistics: Path) -> Checkpoint:
    """The `count` experts of each layer with the largest mean of router weight times output (REAP).

    Says which share of all routed output they gave during calibration: what is lost of it is not what the model loses,
    `mmquant eval` measures that.
    """
    from ..calibration.statistics.store import open_statistics

    stored, layers = open_statistics(statistics), source.geometry.layers
    stored.check(source.fingerprint, layers)
    if not source.geometry.experts_per_token <= count <= source.geometry.experts:
        least, most = source.geometry.experts_per_token, source.geometry.experts
        raise InputError(f"--experts {count}: expected {least} to {most}")
    routing = [stored.layer(layer, second=False).routing for layer in range(layers)]
    kept = most_salient([r.saliency for r in routing], [r.tokens_per_expert for r in routing], count)
    given = [float(r.saliency[list(chosen)].sum() / r.saliency.sum()) for r, chosen in zip(routing, kept, strict=True)]
    worst = min(range(layers), key=lambda layer: given[layer])
    share = f"{100 * sum(given) / layers:.1f} %, least {100 * given[worst]:.1f} % in layer {worst}"
    current().message(f"{count} of {source.geometry.experts} experts stay; they gave {share} of the routed output")
    return PrunedCheckpoint(source, kept)
