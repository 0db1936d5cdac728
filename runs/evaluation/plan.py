"""What an evaluation would run, and the memory that it takes (`mmquant eval --dry-run`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.tables import GIB
from mmquant.tables import table as aligned

from ..models import choose_device
from ..options_use import EvalOptions
from ..results import Result

if TYPE_CHECKING:
    from ...convert.hub.store import FetchOptions

WORDS = {
    "hidden": "hidden states of all models",
    "layer": "weights of a layer",
    "batch": "activations of a batch",
    "chosen": "chosen experts",
    "head": "head and logits, at the end",
    "peak": "at most, beside the hidden states",
}


@dataclass(frozen=True)
class EvaluationPlan(Result):
    """What would be scored and the bytes of one rank; `models`: the reference, candidates, engines' and floors'."""

    models: tuple[str, ...]
    windows: int
    context: int
    positions: int
    ranges: tuple[tuple[int, int], ...]
    ranks: int
    device: str
    hidden_place: str
    bytes: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """What `eval --dry-run --json` prints."""
        plain = {name: getattr(self, name) for name in ("windows", "context", "positions", "ranks", "device")}
        models, ranges = list(self.models), [list(one) for one in self.ranges]
        more = {"models": models, "position_ranges": ranges, "hidden_place": self.hidden_place}
        return {"dry_run": True, **plain, **more, "bytes": self.bytes}

    def table(self) -> str:
        """The same for people."""
        scored = f"{self.positions} positions in {self.windows} windows of {self.context}"
        lines = [f"{len(self.models)} models, {scored}, {self.ranks} ranks, {self.device}"]
        lines += [f"  {name}" for name in self.models]
        places = {"hidden": self.hidden_place}
        rows = [(words, f"{self.bytes[name] / GIB:,.3f}", places.get(name, "")) for name, words in WORDS.items()]
        return "\n".join([*lines, "", *aligned(("memory of a rank", "GiB", "where"), rows, text=("memory of a rank",))])


def plan_evaluation(
    artifacts: str | Path | Sequence[str | Path],
    reference: str | Path | None = None,
    options: EvalOptions | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
) -> EvaluationPlan:
    """What `evaluate` would do with the same arguments and the memory that it takes; only headers and text are read.

    Raises InputError for what `evaluate` refuses before it begins.
    """
    from ...calibration.evaluate.memory import memory_of
    from ...calibration.evaluate.streamed import models_of
    from ...calibration.model.distributed import current_ranks, rank_device
    from .run import check_asked, opened_all, settings_of
    from .text import make_eval_sample

    chosen = options or EvalOptions()
    paths = (str(artifacts),) if isinstance(artifacts, str | Path) else tuple(str(path) for path in artifacts)
    against = None if reference is None else str(reference)
    check_asked(paths, against, chosen)
    with ExitStack() as stack:
        truth, candidates = opened_all(paths, against, fetch, stack)
        basis = truth if truth is not None else candidates[0]
        sample = make_eval_sample(basis, paths, chosen)
        place = str(rank_device(choose_device(device)))
        settings, ranks = settings_of(place, chosen), current_ranks().world
        models = models_of(None if chosen.reference_logits else truth, candidates, sample, settings)
        memory = memory_of(
            *(basis.geometry, sample.windows, sample.context, len(models)),
            dtype=settings.dtype,
            device=place,
            tokens=settings.tokens,
            changed=any(model["like"] is not None for model in models),
            ranks=ranks,
            hidden_sizes=[model["source"].geometry.hidden for model in models],
        )
        where = "in files" if memory.hidden > settings.ram_limit else "in memory"
        where = f"on the device, else {where}" if place.startswith("cuda") else where
        sizes = {name: int(getattr(memory, name)) for name in WORDS}
        named = [
            (m["label"], "reference" if m.get("of", -1) < 0 and m["kind"] == "exact" else m["kind"]) for m in models
        ]
        labels = tuple(f"{label} ({kind})" for label, kind in named)
        facts = (sample.windows, sample.context, int(sample.scored.sum()), sample.ranges, ranks, place)
        return EvaluationPlan(labels, *facts, where, sizes)
