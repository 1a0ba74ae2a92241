"""Pixel calibration and temperature scaling.

All metrics are computed from one histogram: counts of negative and positive pixels over fine bins
of the logit log(p / (1 - p)). It has a fixed size, so a split of any size needs one pass, and a
temperature only rescales the bin centres. A pixel is represented by the centre of its bin, at most
1 / 512 from its logit; its side of the threshold is exact. The bins cover the range of a float32
sigmoid, which reaches further below 0 than above: probabilities rounded to 0 count as logit -88,
probabilities rounded to 1 as logit 17.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

LOWEST, HIGHEST = -88, 17  # logits: a float32 sigmoid is 0 below -87.3 and 1 above 17.3
BINS_PER_LOGIT = 256
NUM_BINS = BINS_PER_LOGIT * (HIGHEST - LOWEST)
MIDDLE = -BINS_PER_LOGIT * LOWEST  # first bin with p >= 0.5
CENTRES = (np.arange(NUM_BINS) + 0.5 - MIDDLE) / BINS_PER_LOGIT
ECE_BINS = 15
TEMPERATURES = (0.02, 50.0)  # range of the fit

Histogram = np.ndarray  # (2, NUM_BINS) int64: negative pixels, then positive pixels


def histogram(probs: np.ndarray, mask: np.ndarray) -> Histogram:
    """Counts the pixels of one image per logit bin; add the results over a split.

    Args:
      probs: Probabilities in [0, 1], any shape.
      mask: Reference mask of the same shape, bool or 0/1.

    Returns:
      (2, NUM_BINS) int64, negative pixels in row 0, positive ones in row 1.

    Raises:
      ValueError: The shapes differ, or a probability is not finite.
    """
    if probs.shape != mask.shape:
        raise ValueError(f"probs {probs.shape} and mask {mask.shape}: expected one shape")
    p = np.asarray(probs, np.float64).ravel()
    if not np.isfinite(p).all():
        raise ValueError("probs: found values that are not finite; expected 0 to 1")
    with np.errstate(divide="ignore"):
        logits = np.log(p) - np.log1p(-p)
    # MIDDLE is added after the floor: adding it to the logit could round across p = 0.5.
    steps = np.floor(np.clip(logits, LOWEST, HIGHEST) * BINS_PER_LOGIT)
    bins = np.minimum(steps.astype(np.int64) + MIDDLE, NUM_BINS - 1)
    positive = np.asarray(mask).ravel() > 0
    counts = np.bincount(bins + NUM_BINS * positive, minlength=2 * NUM_BINS)
    return counts.reshape(2, NUM_BINS)


def gather_histogram(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Histogram:
    """Sums `histogram` over (probs, mask) pairs; the pairs may differ in shape."""
    total = np.zeros((2, NUM_BINS), np.int64)
    for probs, mask in pairs:
        total += histogram(probs, mask)
    return total


def summarize(counts: Histogram, temperature: float = 1.0) -> dict[str, float | None]:
    """Computes calibration metrics of the probabilities after temperature scaling.

    Args:
      counts: Histogram of a split, at least one pixel.
      temperature: T > 0; the probability is sigmoid(logit / T).

    Returns:
      ece: see `expected_calibration_error`; brier: mean (p - y)^2; nll: mean -log p(y), in nats;
      error_auroc: see `error_auroc`.

    Raises:
      ValueError: The histogram is empty.
    """
    total = _num_pixels(counts)
    p = _probabilities(temperature)
    negative, positive = counts
    return {
        "ece": expected_calibration_error(counts, temperature),
        "brier": float((positive * (1 - p) ** 2 + negative * p**2).sum() / total),
        "nll": _nll(counts, temperature),
        "error_auroc": error_auroc(counts),
    }


def expected_calibration_error(counts: Histogram, temperature: float = 1.0) -> float:
    """Computes the expected calibration error, in [0, 1] (Guo et al., 2017).

    The error is the mean over pixels of |accuracy - confidence| in the bin of the pixel. The
    confidence is max(p, 1 - p). There are 15 bins of equal width over [0, 1]; with two classes only
    the upper eight are used.
    """
    p = _probabilities(temperature)
    confidence = np.maximum(p, 1 - p)
    right = np.where(CENTRES >= 0, counts[1], counts[0])
    bins = _equal_width(confidence)
    weight = np.bincount(bins, counts.sum(0), ECE_BINS)
    confidence = np.bincount(bins, counts.sum(0) * confidence, ECE_BINS)
    gaps = np.abs(np.bincount(bins, right, ECE_BINS) - confidence)
    return float(gaps.sum() / weight.sum())


def reliability(counts: Histogram, temperature: float = 1.0) -> list[dict[str, float | int]]:
    """Computes a reliability diagram over 15 equal-width bins of the foreground probability.

    Returns:
      One row per non-empty bin: low, high, mean_probability, observed_frequency (of foreground)
      and count.
    """
    p = _probabilities(temperature)
    bins = _equal_width(p)
    weight = np.bincount(bins, counts.sum(0), ECE_BINS)
    sums = np.bincount(bins, counts.sum(0) * p, ECE_BINS)
    hits = np.bincount(bins, counts[1], ECE_BINS)
    return [
        {
            "low": i / ECE_BINS,
            "high": (i + 1) / ECE_BINS,
            "mean_probability": float(sums[i] / weight[i]),
            "observed_frequency": float(hits[i] / weight[i]),
            "count": int(weight[i]),
        }
        for i in np.flatnonzero(weight)
    ]


def error_auroc(counts: Histogram) -> float | None:
    """Computes the AUROC of the entropy as a detector of wrong pixels; ties count half.

    Temperature scaling keeps the order and does not change it. None if all pixels are correct or
    all are wrong.
    """
    wrong = np.where(CENTRES >= 0, counts[0], counts[1])
    right = counts.sum(0) - wrong
    wrong, right = _by_confidence(wrong), _by_confidence(right)
    pairs = wrong.sum() * right.sum()
    if not pairs:
        return None
    more_confident = np.cumsum(right) - right
    return float((wrong * (more_confident + right / 2)).sum() / pairs)


def fit_temperature(counts: Histogram) -> float:
    """Returns the temperature in `TEMPERATURES` that minimizes the NLL of sigmoid(logit / T).

    Raises:
      ValueError: The histogram is empty.
    """
    from scipy import optimize

    _num_pixels(counts)
    fit = optimize.minimize_scalar(
        lambda log: _nll(counts, float(np.exp(log))),
        bounds=tuple(np.log(TEMPERATURES)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(fit.x))


def report(fitted_on: Histogram, counts: Histogram, split: str = "val") -> dict[str, Any]:
    """Returns the calibration section of results.json, before and after temperature scaling.

    Args:
      fitted_on: Histogram of the split on which the temperature is fitted.
      counts: Histogram of the evaluated split.
      split: Name of the split on which the temperature is fitted.
    """
    temperature = fit_temperature(fitted_on)
    low, high = TEMPERATURES
    return {
        "temperature": temperature,
        # At a limit, the order of the pixels on that split is useless or perfect.
        "at_limit": not 1.01 * low < temperature < 0.99 * high,
        "fitted_on": split,
        "num_pixels": int(counts.sum()),
        "ece_bins": ECE_BINS,
        "before": summarize(counts),
        "after": summarize(counts, temperature),
        "reliability_before": reliability(counts),
        "reliability_after": reliability(counts, temperature),
    }


def _nll(counts: Histogram, temperature: float) -> float:
    logits = CENTRES / temperature
    losses = counts[0] * np.logaddexp(0, logits) + counts[1] * np.logaddexp(0, -logits)
    return float(losses.sum() / counts.sum())


def _by_confidence(counts: np.ndarray) -> np.ndarray:
    """Returns counts by |logit|, most confident first; the entropy decreases with |logit|."""
    folded = counts[:MIDDLE].astype(np.float64)
    above = counts[MIDDLE:][::-1]
    folded[MIDDLE - len(above) :] += above
    return folded


def _probabilities(temperature: float) -> np.ndarray:
    return 1 / (1 + np.exp(np.clip(-CENTRES / temperature, -700, 700)))


def _equal_width(p: np.ndarray) -> np.ndarray:
    """Returns the bin (i / 15, (i + 1) / 15] of values in [0, 1]; 0 belongs to bin 0."""
    return np.clip(np.ceil(p * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)


def _num_pixels(counts: Histogram) -> int:
    total = int(counts.sum())
    if not total:
        raise ValueError("counts: found no pixels; expected at least one")
    return total
