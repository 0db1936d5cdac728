"""Metrics equal their definitions in float64 and llama-perplexity's formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmquant.calibration.evaluate import metrics
from mmquant.calibration.evaluate.metrics import Scores, compare, interval, jaccard, join_metrics, summarise


def distributions(rows: int, vocab: int, seed: int = 0, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, vocab, generator=generator) * 3
    return base, base + torch.randn(rows, vocab, generator=generator) * noise


def by_definition(base: torch.Tensor, logits: torch.Tensor, target: int) -> tuple[float, float, float, float]:
    """(nll, reference's nll, KL divergence, probability shift) of one position with math.exp and fsum."""
    p = [math.exp(v - max(base.tolist())) for v in base.tolist()]
    q = [math.exp(v - max(logits.tolist())) for v in logits.tolist()]
    p, q = [v / math.fsum(p) for v in p], [v / math.fsum(q) for v in q]
    kld = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return -math.log(q[target]), -math.log(p[target]), kld, q[target] - p[target]


@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (7, 13), (5, 301)])
def test_compare_is_the_definition(rows: int, vocab: int) -> None:
    base, logits = distributions(rows, vocab)
    target = torch.arange(rows) % vocab
    found = compare(base, logits, target)
    for i in range(rows):
        wanted = by_definition(base[i], logits[i], int(target[i]))
        got = (found.nll[i], found.nll_reference[i], found.kld[i], found.shift[i])
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)
        assert found.same[i] == (int(base[i].argmax()) == int(logits[i].argmax()))


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    base, logits = distributions(9, 11)
    whole = compare(base, logits, torch.arange(9))
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 8 * 11 * 2)
    parts = compare(base, logits, torch.arange(9))
    for name in Scores.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_equal_models_have_no_distance_however_far_the_logits_are() -> None:
    base, _ = distributions(4, 50)
    found = compare(base, base + 1e4, torch.zeros(4, dtype=torch.int64))
    assert found.kld.max() < 1e-6
    assert found.same.all()


def test_a_small_divergence_keeps_its_digits() -> None:
    """KL of a small change d of the logits is half the variance of d under p; float32 sums would lose it."""
    base, _ = distributions(1, 400)
    step = torch.randn(1, 400, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1e-4
    p = torch.softmax(base.double(), -1)
    wanted = 0.5 * float((p * step**2).sum() - (p * step).sum() ** 2)
    found = compare(base.double(), base.double() + step, torch.zeros(1, dtype=torch.int64)).kld[0]
    assert found == pytest.approx(wanted, rel=1e-3)


def test_positions_that_are_not_finite_are_counted_and_never_averaged() -> None:
    base, logits = distributions(6, 9)
    clean = compare(base[:4], logits[:4], torch.arange(4))
    logits[4, 3], logits[5, 0] = float("nan"), float("inf")
    found = compare(base, logits, torch.arange(6))
    units = np.array([0, 0, 1, 1, 2, 2])
    broken, whole = summarise(found, units), summarise(clean, units[:4])
    assert (broken["nonfinite"], broken["tokens"]) == (2, 6)
    for key in ("ppl", "ppl_ratio", "top1", "kld", "shift_rms"):
        assert broken[key] == whole[key]


def test_nothing_finite_gives_no_number() -> None:
    base, logits = distributions(3, 5)
    found = summarise(compare(base, logits * float("nan"), torch.zeros(3, dtype=torch.int64)), np.zeros(3, np.int64))
    assert found["nonfinite"] == 3
    assert found["ppl"] is None
    assert found["kld"]["mean"] is None


def test_a_reference_that_is_not_finite_is_refused() -> None:
    base, logits = distributions(3, 5)
    base[1, 1] = float("nan")
    with pytest.raises(ValueError, match="reference: logits of 1 of 3 positions are not finite"):
        compare(base, logits, torch.zeros(3, dtype=torch.int64))


def test_vocabularies_must_agree() -> None:
    with pytest.raises(ValueError, match="vocabularies differ: reference 5, candidate 6"):
        compare(torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64))


def test_summary_is_llama_perplexitys() -> None:
    """Its formulas (tools/perplexity/perplexity.cpp): standard errors, paired ratio, interpolated percentiles."""
    base, logits = distributions(501, 17, seed=5)
    scores = compare(base, logits, torch.arange(501) % 17)
    found = summarise(scores, np.arange(501))
    n, nll, ref = 501, scores.nll, scores.nll_reference
    error, error_ref = (math.sqrt((v**2).mean() - v.mean() ** 2) / math.sqrt(n - 1) for v in (nll, ref))
    covariance = ((nll * ref).mean() - nll.mean() * ref.mean()) / (n - 1)
    ratio = math.exp(nll.mean() - ref.mean())
    assert found["ppl"] == pytest.approx(math.exp(nll.mean()))
    assert found["ppl_stderr"] == pytest.approx(found["ppl"] * error)
    assert found["ppl_ratio"] == pytest.approx(ratio)
    wanted = ratio * math.sqrt(error**2 + error_ref**2 - 2 * covariance)
    assert found["ppl_ratio_stderr"] == pytest.approx(wanted, rel=1e-6)
    ordered = np.sort(scores.kld)
    for name, fraction in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999)):
        at = fraction * (n - 1)
        low = int(at)
        value = ordered[low] + (at - low) * (ordered[min(low + 1, n - 1)] - ordered[low])
        assert found["kld"][name] == pytest.approx(value)
    assert found["kld"]["max"] == ordered[-1]
    assert found["shift_rms"] == pytest.approx(math.sqrt((scores.shift**2).mean()))


def test_interval_resamples_whole_documents() -> None:
    """Against drawing documents one by one; documents of unequal length weigh by their positions."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(3, 60, 25)
    unit = np.repeat(np.arange(25) * 7 + 3, sizes)  # ids with gaps
    values = rng.normal(size=len(unit)) + np.repeat(rng.normal(size=25) * 3, sizes)
    found = interval(values, unit, seed=0)
    assert found is not None
    documents = [values[unit == name] for name in np.unique(unit)]
    means = []
    for _ in range(3000):
        drawn = [documents[i] for i in rng.integers(0, 25, 25)]
        means.append(np.concatenate(drawn).mean())
    np.testing.assert_allclose(found, np.quantile(means, (0.025, 0.975)), atol=0.12)
    independent = 1.96 * values.std() / math.sqrt(len(values))
    assert found[1] - found[0] > 4 * independent, "positions of a document are not independent"


def test_interval_needs_two_documents_and_a_seed_repeats_it() -> None:
    values = np.arange(10.0)
    assert interval(values, np.zeros(10, np.int64), 0) is None
    units = np.arange(10)
    assert interval(values, units, 4) == interval(values, units, 4) != interval(values, units, 5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_jaccard_is_that_of_sets(rows: int, chosen: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = (np.stack([rng.permutation(9)[:chosen] for _ in range(rows)]) for _ in range(2))
    found = jaccard(torch.from_numpy(first), torch.from_numpy(second))
    for i in range(rows):
        a, b = set(first[i].tolist()), set(second[i].tolist())
        assert found[i].item() == pytest.approx(len(a & b) / len(a | b))


def test_joined_scores_keep_their_order() -> None:
    base, logits = distributions(5, 6)
    target = torch.arange(5)
    whole = compare(base, logits, target)
    parts = join_metrics([compare(base[:2], logits[:2], target[:2]), compare(base[2:], logits[2:], target[2:])])
    np.testing.assert_array_equal(whole.kld, parts.kld)
