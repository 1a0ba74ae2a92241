"""Calibration metrics from the histogram, against direct computation and SciPy."""

import itertools

import numpy as np
import pytest
from scipy import optimize, special, stats

from biclip_jax.evaluation.metrics import calibration

BIN = 1 / 256  # bin width in logits


def pixels(scale=1.0, n=20_000, seed=0):
    """Logits and masks that are calibrated at scale 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, n)
    mask = rng.random(n) < special.expit(logits)
    return special.expit(scale * logits), mask


def direct_ece(p, y):
    confidence, correct = np.maximum(p, 1 - p), (p >= 0.5) == y
    edges = np.linspace(0, 1, 16)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.sum() * abs(correct[inside].mean() - confidence[inside].mean())
    return total / len(p)


def test_metrics_match_direct_computation():
    p, y = pixels(scale=2.0)
    result = calibration.summarize(calibration.histogram(p, y))
    assert result["brier"] == pytest.approx(np.mean((p - y) ** 2), abs=BIN / 8)
    nll = -np.mean(np.where(y, np.log(p), np.log1p(-p)))
    assert result["nll"] == pytest.approx(nll, abs=BIN / 2)
    # Pixels within half a logit bin of one of the 15 edges may fall into the other bin.
    assert result["ece"] == pytest.approx(direct_ece(p, y), abs=2e-3)
    assert result["ece"] > 0.03


def test_overconfident_pixels_have_a_larger_error_than_calibrated_ones():
    calibrated = calibration.summarize(calibration.histogram(*pixels(n=400_000)))
    assert calibrated["ece"] < 0.003
    sharp = calibration.summarize(calibration.histogram(*pixels(3.0, n=400_000)))
    assert sharp["ece"] > 0.05 and sharp["nll"] > calibrated["nll"]


def test_reliability_rows_are_means_of_their_bins():
    p, y = pixels(n=50_000)
    rows = calibration.reliability(calibration.histogram(p, y))
    assert len(rows) == 15 and sum(row["count"] for row in rows) == len(p)
    for row in rows:
        inside = (p > row["low"]) & (p <= row["high"])
        assert row["count"] == pytest.approx(inside.sum(), rel=0.02)
        assert row["mean_probability"] == pytest.approx(p[inside].mean(), abs=1e-3)
        assert row["observed_frequency"] == pytest.approx(y[inside].mean(), abs=5e-3)
    rows = calibration.reliability(calibration.histogram(np.array([0.0, 1.0]), np.array([0, 1])))
    assert [row["count"] for row in rows] == [1, 1]
    assert [row["observed_frequency"] for row in rows] == [0, 1]


def test_error_auroc_equals_mann_whitney_with_ties():
    rng = np.random.default_rng(1)
    # Few distinct values: pixels tie, and p and 1 - p have the same entropy.
    p = rng.choice([0.02, 0.2, 0.4, 0.6, 0.8, 0.98], 3000)
    y = rng.random(3000) < 0.3 + 0.5 * p
    wrong = (p >= 0.5) != y
    entropy = np.round(special.entr(p) + special.entr(1 - p), 9)
    statistic = stats.mannwhitneyu(entropy[wrong], entropy[~wrong]).statistic
    expected = statistic / (wrong.sum() * (~wrong).sum())
    assert calibration.error_auroc(calibration.histogram(p, y)) == pytest.approx(expected, abs=1e-9)


def test_error_auroc_of_distinct_pixels_and_without_errors():
    p, y = pixels(n=5000)
    wrong = (p >= 0.5) != y
    entropy = special.entr(p) + special.entr(1 - p)
    statistic = stats.mannwhitneyu(entropy[wrong], entropy[~wrong]).statistic
    expected = statistic / (wrong.sum() * (~wrong).sum())
    assert calibration.error_auroc(calibration.histogram(p, y)) == pytest.approx(expected, abs=1e-3)
    perfect = calibration.histogram(np.array([0.1, 0.9]), np.array([0, 1]))
    assert calibration.error_auroc(perfect) is None


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_the_temperature_recovers_a_known_scale(scale):
    counts = calibration.histogram(*pixels(scale, n=300_000))
    temperature = calibration.fit_temperature(counts)
    assert temperature == pytest.approx(scale, rel=0.02)
    after = calibration.summarize(counts, temperature)
    assert after["ece"] < 0.005
    assert after["nll"] <= calibration.summarize(counts)["nll"] + 1e-9
    assert after["error_auroc"] == calibration.summarize(counts)["error_auroc"]


def test_resolves_probabilities_below_the_float32_resolution_at_one():
    # Mostly background with logit -40, and pixels that are calibrated at T = 6.
    rng = np.random.default_rng(0)
    uncertain = rng.normal(0, 6, 10_000)
    logits = np.concatenate([np.full(990_000, -40.0), uncertain])
    mask = np.concatenate([np.zeros(990_000), rng.random(10_000) < special.expit(uncertain / 6)])

    def nll(temperature):
        tempered = np.where(mask > 0, -logits, logits) / temperature
        return np.logaddexp(0, tempered).mean()

    best = optimize.minimize_scalar(nll, bounds=(0.5, 20), method="bounded")
    assert 4 < best.x < 4.5
    counts = calibration.histogram(special.expit(logits).astype(np.float32), mask)
    temperature = calibration.fit_temperature(counts)
    assert temperature == pytest.approx(best.x, rel=2e-3)
    for t in (1.0, temperature):
        assert calibration.summarize(counts, t)["nll"] == pytest.approx(nll(t), rel=2e-3)
    p = special.expit(logits / temperature)
    after = calibration.summarize(counts, temperature)
    assert after["brier"] == pytest.approx(np.mean((p - mask) ** 2), rel=1e-3)
    assert after["ece"] == pytest.approx(direct_ece(p, mask > 0), abs=1e-4)


def test_every_float32_probability_is_binned_at_its_logit():
    tiny, one = np.finfo(np.float32).tiny, np.float32(1)
    p = np.array([tiny, 1e-20, 0.3, 0.5, np.nextafter(one, 0, dtype=np.float32)], np.float32)
    for value in p:
        counts = calibration.histogram(value[None], np.zeros(1))
        centre = calibration.CENTRES[np.flatnonzero(counts[0])]
        assert centre == pytest.approx(special.logit(np.float64(value)), abs=BIN / 2 + 1e-9)
    ends = calibration.histogram(np.array([0.0, 1.0]), np.array([0, 1]))
    assert ends[0, 0] == ends[1, -1] == 1


def test_scaling_the_histogram_equals_scaling_the_pixels():
    p, y = pixels(n=30_000)
    tempered = special.expit(special.logit(p) / 1.7)
    result = calibration.summarize(calibration.histogram(p, y), 1.7)
    expected = calibration.summarize(calibration.histogram(tempered, y))
    for name in ("ece", "brier", "nll"):
        assert result[name] == pytest.approx(expected[name], abs=2e-3)


def test_the_threshold_is_exact_and_extremes_are_counted():
    p = np.array([0.5, np.nextafter(0.5, 0), 0.0, 1.0], np.float64)
    counts = calibration.histogram(p, np.array([1, 0, 0, 1]))
    assert calibration.error_auroc(counts) is None  # every pixel is correct
    assert counts.sum() == 4 and counts[0, 0] == 1 and counts[1, -1] == 1


def test_gather_histogram_adds_images_of_any_size():
    p, y = pixels(n=600)
    parts = [(p[:100].reshape(10, 10), y[:100].reshape(10, 10)), (p[100:], y[100:])]
    np.testing.assert_array_equal(calibration.gather_histogram(parts), calibration.histogram(p, y))


def test_rejects_invalid_input():
    with pytest.raises(ValueError, match="one shape"):
        calibration.histogram(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="not finite"):
        calibration.histogram(np.array([np.nan]), np.zeros(1))
    with pytest.raises(ValueError, match="no pixel"):
        calibration.summarize(calibration.gather_histogram([]))
    with pytest.raises(ValueError, match="no pixel"):
        calibration.fit_temperature(calibration.gather_histogram([]))


def test_report_fits_on_one_split_and_evaluates_the_other():
    val = calibration.histogram(*pixels(2.0, n=100_000, seed=1))
    test = calibration.histogram(*pixels(2.0, n=100_000, seed=2))
    result = calibration.report(val, test)
    assert result["fitted_on"] == "val"
    assert result["temperature"] == calibration.fit_temperature(val)
    assert result["num_pixels"] == 100_000
    assert result["before"] == calibration.summarize(test)
    assert result["after"]["ece"] < result["before"]["ece"] / 3
    assert sum(row["count"] for row in result["reliability_after"]) == 100_000
    assert not result["at_limit"]


def test_reports_a_temperature_at_its_limit():
    p, y = pixels(n=20_000)
    inverted = calibration.histogram(p, ~y)
    assert calibration.report(inverted, inverted)["at_limit"]
    assert calibration.report(inverted, inverted)["temperature"] > 49
