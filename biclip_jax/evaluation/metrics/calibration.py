"""Whether probabilities mean what they say: calibration of pixels, and one temperature.

Everything follows from one structure, the counts of positive and negative pixels over fine bins of
the logit log(p / (1 - p)): any number of pixels fits, splits are gathered in one pass, and a
temperature only moves the bins. A pixel counts with the centre of its bin, which is at most
1 / 512 from its own logit; its side of the threshold is exact. The bins reach as far as a float32
sigmoid does, which is further below than above: what it rounds to 0 counts as -88, what it rounds
to 1 as 17, however sure the model was beyond that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

LOWEST, HIGHEST = -88, 17  # logits: a float32 sigmoid is 0 below -87.3, and 1 from 17.3 on
BINS_A_UNIT = 256  # of the logit
NUM_BINS = BINS_A_UNIT * (HIGHEST - LOWEST)
MIDDLE = -BINS_A_UNIT * LOWEST  # first bin from p = 0.5 on, which lies on its edge
CENTRES = (np.arange(NUM_BINS) + 0.5 - MIDDLE) / BINS_A_UNIT
ECE_BINS = 15
TEMPERATURES = (0.02, 50.0)  # where the fit may end

Histogram = np.ndarray  # (2, NUM_BINS) int64: negative, then positive pixels of each logit


def histogram(probs: np.ndarray, mask: np.ndarray) -> Histogram:
    """Counts of the pixels of one picture, to be added over a split.

    Args:
      probs: in [0, 1], any shape.
      mask: of the same shape, bool or 0/1.

    Returns:
      (2, NUM_BINS) int64, negative pixels in row 0, positive ones in row 1.

    Raises:
      ValueError: shapes that differ, or a probability that is not finite.
    """
    if probs.shape != mask.shape:
        raise ValueError(f"probs {probs.shape} and mask {mask.shape}: expected one shape")
    p = np.asarray(probs, np.float64).ravel()
    if not np.isfinite(p).all():
        raise ValueError("probs: found values that are not finite; expected 0 to 1")
    with np.errstate(divide="ignore"):
        logits = np.log(p) - np.log1p(-p)
    # The middle is added to the floor, not to the logit: rounding would hide the side of 0.5.
    steps = np.floor(np.clip(logits, LOWEST, HIGHEST) * BINS_A_UNIT)
    place = np.minimum(steps.astype(np.int64) + MIDDLE, NUM_BINS - 1)
    positive = np.asarray(mask).ravel() > 0
    counts = np.bincount(place + NUM_BINS * positive, minlength=2 * NUM_BINS)
    return counts.reshape(2, NUM_BINS)


def gather_histogram(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Histogram:
    """`histogram` added over (probs, mask) pairs; the pairs may differ in shape."""
    total = np.zeros((2, NUM_BINS), np.int64)
    for probs, mask in pairs:
        total += histogram(probs, mask)
    return total


def summarize(counts: Histogram, temperature: float = 1.0) -> dict[str, float | None]:
    """How far the probabilities, after `temperature`, are from what happens.

    Args:
      counts: of a split, at least one pixel.
      temperature: T > 0; the probability is sigmoid(logit / T).

    Returns:
      ece: see `expected_calibration_error`; brier: mean (p - y)^2; nll: mean -log p(y), in nats;
      error_auroc: see there, None where every pixel is right or every one wrong.

    Raises:
      ValueError: no pixels.
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
    """The mean over pixels of |accuracy - confidence| of each pixel's bin (Guo et al., 2017).

    The confidence is that of the predicted class, max(p, 1 - p); the bins are 15 of equal width
    over [0, 1], of which two classes reach the upper eight.
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
    """Rows of a reliability diagram: 15 equal-width bins of the foreground probability.

    Returns:
      low, high, mean_probability, observed_frequency (of foreground), count; bins without pixels
      are left out.
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
    """The chance that a wrong pixel has more entropy than a right one; equal ones count half.

    A temperature does not change it: it keeps the order. None where there is no pair.
    """
    wrong = np.where(CENTRES >= 0, counts[0], counts[1])
    right = counts.sum(0) - wrong
    wrong, right = _surest_first(wrong), _surest_first(right)
    pairs = wrong.sum() * right.sum()
    if not pairs:
        return None
    surer = np.cumsum(right) - right
    return float((wrong * (surer + right / 2)).sum() / pairs)


def fit_temperature(counts: Histogram) -> float:
    """The T of least NLL, within `TEMPERATURES`; sigmoid(logit / T) is then the probability.

    Raises:
      ValueError: no pixels.
    """
    from scipy import optimize

    _num_pixels(counts)
    found = optimize.minimize_scalar(
        lambda log: _nll(counts, float(np.exp(log))),
        bounds=tuple(np.log(TEMPERATURES)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def report(fitted_on: Histogram, counts: Histogram, split: str = "val") -> dict[str, Any]:
    """The calibration section of results.json: before and after a fitted temperature.

    Args:
      fitted_on: of the split that the temperature is fitted on.
      counts: of the evaluated split.
      split: the name of the first.
    """
    temperature = fit_temperature(fitted_on)
    low, high = TEMPERATURES
    return {
        "temperature": temperature,
        # Then the pixels' order is of no use on that split, or without a fault.
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


def _surest_first(counts: np.ndarray) -> np.ndarray:
    """Counts by |logit|, which alone the entropy depends on, and with which it falls."""
    folded = counts[:MIDDLE].astype(np.float64)
    above = counts[MIDDLE:][::-1]
    folded[MIDDLE - len(above) :] += above
    return folded


def _probabilities(temperature: float) -> np.ndarray:
    return 1 / (1 + np.exp(np.clip(-CENTRES / temperature, -700, 700)))


def _equal_width(p: np.ndarray) -> np.ndarray:
    """The bins ((i) / 15, (i + 1) / 15] of values in [0, 1]; 0 falls into the first."""
    return np.clip(np.ceil(p * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)


def _num_pixels(counts: Histogram) -> int:
    total = int(counts.sum())
    if not total:
        raise ValueError("counts: found no pixel; expected at least one")
    return total
