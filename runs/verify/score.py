"""Rates over verdicts, with 95 % intervals, and the comparison of two servers prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...convert.models import ARCHITECTURES
from .judge import Verdict

Z = 1.959964  # of a 95 % interval
# name -> (what is counted of one verdict; None: not judged), whether high is good, what MiniMax calls right
RATES: dict[str, tuple[Callable[[Verdict], bool | None], bool, float | None]] = {
    "match": (lambda v: v.match, True, 0.98),
    "schema": (lambda v: v.schema, True, 0.98),
    "only_reasoning": (lambda v: v.only_reasoning, False, 0.0),
    "thought": (lambda v: v.thought, True, None),
    "broken_tags": (lambda v: v.broken_tags, False, None),
    "language": (lambda v: v.language, True, 0.4),
    "scenario": (lambda v: v.scenario, True, 1.0),
    "repeats": (lambda v: v.repeats, False, None),
}
# What the model's makers measured at their own server. Their prompts are others than ours: a guide, not a reference.
KNOWN = next(row.serving for row in ARCHITECTURES.values() if row.serving is not None and row.serving.agents)
PUBLISHED = KNOWN.agents


def interval(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    if not total:
        return 0.0, 1.0
    p, z2 = hits / total, Z * Z / total
    middle = (p + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(p * (1 - p) / total + z2 / (4 * total)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(values: Sequence[bool]) -> dict[str, Any]:
    """A rate with its count and interval; null where nothing was judged."""
    if not values:
        return {"rate": None, "hits": 0, "of": 0, "ci95": None}
    hits = sum(values)
    return {"rate": hits / len(values), "hits": hits, "of": len(values), "ci95": list(interval(hits, len(values)))}


def rates(verdicts: Sequence[Verdict | None]) -> dict[str, dict[str, Any]]:
    """All rates; None: a request that got no answer after its tries."""
    answered = [v for v in verdicts if v is not None]
    found = {"success": rate([v is not None for v in verdicts])}
    for name, (count, _, _) in RATES.items():
        found[name] = rate([value for v in answered if (value := count(v)) is not None])
    return found


def missed(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rates beyond what MiniMax calls right; one whose interval reaches it is not."""
    limits = {
        "success": (True, 1.0),
        **{n: (high, limit) for n, (_, high, limit) in RATES.items() if limit is not None},
    }
    lines: list[str] = []
    for name, (high, limit) in limits.items():
        value, ends = found[name]["rate"], found[name]["ci95"]
        exact = limit in (0.0, 1.0)
        beyond = value is not None and ((value != limit) if exact else (ends[1] < limit if high else ends[0] > limit))
        if beyond:
            lines.append(f"{name} {value:.3f}, expected {'at least' if high else 'at most'} {limit:g}")
    return lines


def compare(ours: Mapping[str, Verdict | None], reference: Mapping[str, Verdict | None]) -> dict[str, Any]:
    """Two servers on the same prompts, by key: F1 of calling a tool (the reference is right), and who differs where."""
    both = [(key, ours[key], reference[key]) for key in ours if key in reference]
    pairs = [(key, a, b) for key, a, b in both if a is not None and b is not None]
    true = sum(a.called and b.called for _, a, b in pairs)
    false = sum(a.called and not b.called for _, a, b in pairs)
    lost = sum(b.called and not a.called for _, a, b in pairs)
    total = 2 * true + false + lost
    return {
        "pairs": len(pairs),
        "trigger_similarity": 2 * true / total if total else None,
        "rates": {name: _paired(pairs, count) for name, (count, _, _) in RATES.items()},
        "different": [key for key, a, b in pairs if a != b],
    }


def _paired(pairs: Sequence[tuple[str, Verdict, Verdict]], count: Callable[[Verdict], bool | None]) -> dict[str, Any]:
    """Where one server has it and the other has not, and the exact sign test's p (McNemar's)."""
    from scipy.stats import binomtest

    judged = [(count(a), count(b)) for _, a, b in pairs]
    ours = sum(bool(a) and not b for a, b in judged if a is not None and b is not None)
    theirs = sum(bool(b) and not a for a, b in judged if a is not None and b is not None)
    p = float(binomtest(ours, ours + theirs).pvalue) if ours + theirs else 1.0
    return {"ours_alone": ours, "reference_alone": theirs, "p": p}
