"""Dice and IoU, global and mean, with bootstrap confidence intervals.

Papers that follow LViT report two kinds of Dice without distinction. `global` pools the pixels of
all images before dividing, so large lesions dominate. `mean` averages one value per image, so every
image has the same weight. They differ by several points on the same predictions, so every number
here is named after its kind. IoU = D / (2 - D) holds only for the global kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Array = Any  # numpy or jax
THRESHOLD = 0.5  # probability from which a pixel is foreground


class Overlap(NamedTuple):
    """Pixel counts per image: integer arrays of equal shape, usually (B,).

    Attributes:
      intersection: Pixels in both prediction and mask.
      pred_area: Pixels in the prediction.
      mask_area: Pixels in the mask.
    """

    intersection: Array
    pred_area: Array
    mask_area: Array


def _as_bool(x: Array) -> Array:
    return x if x.dtype == bool else x >= THRESHOLD


def count_pixels(pred: Array, mask: Array, axis: int | Sequence[int] = (1, 2, 3)) -> Overlap:
    """Counts the pixels of the prediction, the mask and their intersection.

    Args:
      pred: (B, H, W, 1), bool, or numbers thresholded at >= 0.5.
      mask: The same shape and type of values.
      axis: Axes to sum over; the default returns one count per image.

    Returns:
      Numpy integers for numpy inputs, int32 for jax inputs (exact below 2^31).

    Raises:
      ValueError: The shapes differ.
    """
    if pred.shape != mask.shape:
        raise ValueError(f"pred {pred.shape} and mask {mask.shape}: expected one shape")
    pred, mask = _as_bool(pred), _as_bool(mask)
    axis = axis if isinstance(axis, int) else tuple(axis)
    return Overlap((pred & mask).sum(axis), pred.sum(axis), mask.sum(axis))


def dice(counts: Overlap) -> Array:
    """Returns 2 |P n M| / (|P| + |M|) in [0, 1], with the shape of the counts.

    1 if both are empty.
    """
    total = counts.pred_area + counts.mask_area
    # Adding 1 to numerator and denominator of empty pairs turns 0/0 into 1.
    return (2 * counts.intersection + (total == 0)) / (total + (total == 0))


def iou(counts: Overlap) -> Array:
    """Returns |P n M| / |P u M| in [0, 1], with the shape of the counts; 1 if both are empty."""
    union = counts.pred_area + counts.mask_area - counts.intersection
    return (counts.intersection + (union == 0)) / (union + (union == 0))


def _on_host(counts: Overlap) -> Overlap:
    host = Overlap(*(np.asarray(count, np.int64) for count in counts))
    if host.intersection.ndim != 1 or not host.intersection.size:
        raise ValueError(f"counts {host.intersection.shape}: expected (N,), N >= 1")
    return host


def summarize(counts: Overlap) -> dict[str, float | int]:
    """Computes global and mean Dice and IoU of N images.

    Args:
      counts: Arrays (N,), numpy or jax, one entry per image.

    Returns:
      dice_global and iou_global (pixels pooled over the N images), dice_mean and iou_mean (averages
      over images), all in [0, 1], and num_images = N.
    """
    counts = _on_host(counts)
    pooled = Overlap(*(count.sum() for count in counts))
    return {
        "dice_global": float(dice(pooled)),
        "iou_global": float(iou(pooled)),
        "dice_mean": float(dice(counts).mean()),
        "iou_mean": float(iou(counts).mean()),
        "num_images": int(counts.intersection.size),
    }


def bootstrap_intervals(
    counts: Overlap, *, num_resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Computes percentile bootstrap intervals over images.

    The indices are `numpy.random.default_rng(seed).integers(N, size=(R, N))`. Images are treated as
    independent: with several slices per patient the intervals are too narrow.

    Args:
      counts: Arrays (N,), one entry per image.
      num_resamples: Number of bootstrap samples R.
      level: Coverage of the interval, in (0, 1).
      seed: Seed of the bootstrap samples.

    Returns:
      (low, high) for dice_global, iou_global, dice_mean and iou_mean.
    """
    counts = _on_host(counts)
    num_images = counts.intersection.size
    rows = np.random.default_rng(seed).integers(num_images, size=(num_resamples, num_images))
    pooled = Overlap(*(count[rows].sum(axis=1) for count in counts))
    samples = {
        "dice_global": dice(pooled),
        "iou_global": iou(pooled),
        "dice_mean": dice(counts)[rows].mean(axis=1),
        "iou_mean": iou(counts)[rows].mean(axis=1),
    }
    ends = [(1 - level) / 2, (1 + level) / 2]
    return {name: tuple(np.quantile(x, ends).tolist()) for name, x in samples.items()}


def overlap_sums(
    probs: Array, mask: Array, valid: Array, threshold: float = 0.5
) -> dict[str, Array]:
    """Computes the sums of a batch from which `from_sums` derives Dice and IoU; jittable.

    All sums can be added over devices (`psum`) and batches. The pixel counts are int32: add batches
    on the host if a split can have 2^31 or more foreground pixels.

    Args:
      probs: (B, H, W, 1) in [0, 1]; pixels >= threshold are foreground.
      mask: (B, H, W, 1), bool or 0/1.
      valid: (B,) bool, False for padding rows.
      threshold: In [0, 1].

    Returns:
      Scalars over the valid images: intersection, pred_area, mask_area, count (int32), dice_sum and
      iou_sum (float32).
    """
    valid = jnp.asarray(valid)
    counts = count_pixels(jnp.asarray(probs) >= threshold, jnp.asarray(mask))
    per_image = {**counts._asdict(), "dice_sum": dice(counts), "iou_sum": iou(counts)}
    sums = {name: jnp.where(valid, x, 0).sum() for name, x in per_image.items()}
    return {**sums, "count": valid.astype(jnp.int32).sum()}


def from_sums(sums: Mapping[str, Array]) -> dict[str, float | int]:
    """Returns the values of `summarize` from summed results of `overlap_sums`, on the host."""
    num_images = int(sums["count"])
    if num_images < 1:
        raise ValueError(f"count {num_images}: expected at least one valid image")
    pooled = Overlap(*(np.int64(sums[name]) for name in Overlap._fields))
    return {
        "dice_global": float(dice(pooled)),
        "iou_global": float(iou(pooled)),
        "dice_mean": float(sums["dice_sum"]) / num_images,
        "iou_mean": float(sums["iou_sum"]) / num_images,
        "num_images": num_images,
    }


def stack(counts: Sequence[Overlap]) -> Overlap:
    """Stacks the scalar counts of N images into one `Overlap` of int64 arrays (N,)."""
    return Overlap(*(np.asarray(field, np.int64) for field in zip(*counts, strict=True)))


def take(counts: Overlap, rows: np.ndarray) -> Overlap:
    """Selects the counts of some images; `rows` is a boolean mask (N,) or indices."""
    return Overlap(*(np.asarray(field)[rows] for field in counts))
