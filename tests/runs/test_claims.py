"""Paired bootstrap of two artifacts' sums by unit: against a plain loop, and what it may not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmquant.calibration.evaluate.metrics import RESAMPLES, Scores
from mmquant.errors import InputError
from mmquant.runs.evaluation.claims import beyond_floor, check_rivals, paired, refusal, unit_sums


def scores(seed: int, shift: float, noise: float = 0.02, count: int = 600) -> Scores:
    """KLD that depends on the position alike for everybody, and a little on the artifact."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    hard = shared.gamma(0.5, 0.4, count)
    kld = hard + shift + own.normal(0, noise, count)
    finite = np.ones(count, bool)
    finite[5] = False
    return Scores(2 + kld, np.full(count, 2.0), kld, np.zeros(count), own.random(count) < 0.9, finite)


def block(label: str, found: Scores) -> dict[str, Any]:
    return {"label": label, "units": unit_sums(found, np.repeat(np.arange(20) * 3, 30))}


def test_the_interval_is_that_of_a_loop_over_resamples() -> None:
    first, second = scores(1, 0.0), scores(2, 0.01)
    found = paired(block("a", first), block("b", second), 7)
    units = np.repeat(np.arange(20), 30)
    drawn = np.random.default_rng(7).multinomial(20, np.full(20, 1 / 20), size=RESAMPLES)
    means = []
    for counts in drawn:
        total = positions = 0.0
        for unit in range(20):
            rows = (units == unit) & first.finite
            total += counts[unit] * (first.kld - second.kld)[rows].sum()
            positions += counts[unit] * rows.sum()
        means.append(total / positions)
    assert found["kld"]["ci95"] == pytest.approx(np.quantile(means, (0.025, 0.975)), rel=1e-6)
    assert found["kld"]["difference"] == pytest.approx((first.kld - second.kld)[first.finite].mean())
    assert found["units"] == 20
    assert sum(block("a", first)["units"]["tokens"]) == 599


def test_pairs_tell_what_intervals_of_their_own_do_not() -> None:
    """A difference of .005 below positions that vary by .5: paired it is seen, and its claim holds."""
    near, far = block("near", scores(1, 0.0)), block("far", scores(2, 0.005))
    forth, back = paired(near, far), paired(far, near)
    assert (forth["verdict"], back["verdict"]) == ("better", "worse")
    assert forth["kld"]["p"] <= 0.05
    assert refusal({**forth, "holds": True}) is None
    assert "far: not better than near: worse (KLD +0.00" in str(refusal({**back, "holds": False}))
    same = paired(near, near)
    assert (same["verdict"], same["kld"]["p"]) == ("no difference shown", 1.0)


def test_equal_artifacts_are_rarely_told_apart() -> None:
    verdicts = [paired(block("a", scores(2 * i, 0.0)), block("b", scores(2 * i + 1, 0.0)), i) for i in range(40)]
    assert sum(found["verdict"] != "no difference shown" for found in verdicts) <= 6


def test_other_positions_are_not_compared() -> None:
    other = block("b", scores(1, 0.0))
    other["units"] = {name: values[:-1] for name, values in other["units"].items()}
    found = paired(block("a", scores(1, 0.0)), other)
    assert found["verdict"] == "not comparable"
    assert refusal({**found, "holds": False}) == "a: not better than b: not comparable"


def test_a_floor_as_large_is_not_beyond() -> None:
    def whole(label: str, found: Scores, p999: float) -> dict[str, Any]:
        kld = {"mean": float(found.kld.mean()), "p999": p999}
        more = {"kld": kld, "top1": float(found.same.mean()), "ppl_ratio": 1.0, "domains": {}, "layers": []}
        return block(label, found) | more

    floors = [whole("f", scores(3, 0.0), 1.0), whole("g", scores(4, 0.02), 2.0)]
    rows = {row["number"]: row for row in beyond_floor(whole("c", scores(5, 0.01), 1.5), floors, 0)}
    assert not rows["kld"]["beyond"]
    assert not rows["kld p999"]["beyond"]
    assert rows["kld"]["floor"] == floors[1]["kld"]["mean"]
    assert {row["number"]: row for row in beyond_floor(whole("c", scores(5, 0.1), 3.0), floors, 0)}["kld"]["beyond"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("[]", "expected"),
        ('{"schema": "other"}', "schema 'other', expected 'mmquant-eval'"),
        ('{"schema": "mmquant-eval"}', "not a result of eval --json of this version"),
        ('{"schema": "mmquant-eval", "sample": 3}', "not a result of eval --json of this version"),
    ],
)
def test_a_rival_that_is_no_result_is_refused_before_any_work(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=words):
        check_rivals((str(tmp_path / "a.json"),), ("x",))
