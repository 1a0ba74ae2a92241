"""Dice and IoU, global and mean, and how sure one may be of them.

Two kinds of Dice circulate and papers in the line of LViT mix them: `global`
pools the pixels of all images before dividing, so large lesions weigh most;
`mean` averages one value an image, so every image weighs the same. On the same
predictions they differ by several points; every number here says which it is.
Only for the global kind does IoU = D / (2 - D) hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Array = Any  # numpy or jax
THRESHOLD = 0.5  # probability from which a pixel is foreground


class Overlap(NamedTuple):
    """Pixel counts per image, integer arrays of one shape, usually (B,).

    Attributes:
      intersection: pixels in both prediction and mask.
      pred_area: pixels in the prediction.
      mask_area: pixels in the mask.
    """

    intersection: Array
    pred_area: Array
    mask_area: Array


def _as_bool(x: Array) -> Array:
    return x if x.dtype == bool else x >= THRESHOLD


def count_pixels(pred: Array, mask: Array, axis: int | Sequence[int] = (1, 2, 3)) -> Overlap:
    """Counts the pixels of prediction, mask and both.

    Args:
      pred: (B, H, W, 1), bool or 0/1; other values are thresholded at >= 0.5.
      mask: of the same shape, likewise.
      axis: what is summed over; the default leaves one count an image.

    Returns:
      Counts as numpy integers for numpy, int32 for jax (exact below 2^31).
    """
    if pred.shape != mask.shape:
        raise ValueError(f"pred {pred.shape} and mask {mask.shape}: expected one shape")
    pred, mask = _as_bool(pred), _as_bool(mask)
    axis = axis if isinstance(axis, int) else tuple(axis)
    return Overlap((pred & mask).sum(axis), pred.sum(axis), mask.sum(axis))


def dice(counts: Overlap) -> Array:
    """2 |P n M| / (|P| + |M|) in [0, 1], of the counts' shape; both empty is 1."""
    total = counts.pred_area + counts.mask_area
    # Adding the truth of "empty" above and below makes 0/0 a 1 and nothing else.
    return (2 * counts.intersection + (total == 0)) / (total + (total == 0))


def iou(counts: Overlap) -> Array:
    """|P n M| / |P u M| in [0, 1], of the counts' shape; both empty is 1."""
    union = counts.pred_area + counts.mask_area - counts.intersection
    return (counts.intersection + (union == 0)) / (union + (union == 0))


def _on_host(counts: Overlap) -> Overlap:
    host = Overlap(*(np.asarray(count, np.int64) for count in counts))
    if host.intersection.ndim != 1 or not host.intersection.size:
        raise ValueError(f"counts {host.intersection.shape}: expected (N,), N >= 1")
    return host


def summarize(counts: Overlap) -> dict[str, float | int]:
    """Global and mean Dice and IoU of N images.

    Args:
      counts: arrays (N,), numpy or jax, one entry an image.

    Returns:
      dice_global, iou_global (pixels pooled over the N images), dice_mean,
      iou_mean (averages over images), all in [0, 1], and num_images = N.
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
    """Percentile bootstrap intervals, images drawn with replacement.

    The indices are `numpy.random.default_rng(seed).integers(N, size=(R, N))`.
    Images are taken as independent: with several slices of a patient the
    intervals are too narrow.

    Args:
      counts: arrays (N,), one entry an image.
      num_resamples: R.
      level: probability between the two ends, in (0, 1).
      seed: of the drawing; the same seed draws the same images.

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
    """The sums of one batch from which `from_sums` takes Dice and IoU; jittable.

    Every sum may be added over devices (`psum`) and batches. The pixel counts
    are int32: add batches up on the host where a split may hold 2^31
    foreground pixels.

    Args:
      probs: (B, H, W, 1) in [0, 1]; a pixel is predicted where >= threshold.
      mask: (B, H, W, 1), bool or 0/1.
      valid: (B,) bool, false where the row only fills the batch.
      threshold: in [0, 1].

    Returns:
      Scalars: intersection, pred_area, mask_area, count (int32), dice_sum,
      iou_sum (float32, over the valid images).
    """
    valid = jnp.asarray(valid)
    counts = count_pixels(jnp.asarray(probs) >= threshold, jnp.asarray(mask))
    per_image = {**counts._asdict(), "dice_sum": dice(counts), "iou_sum": iou(counts)}
    sums = {name: jnp.where(valid, x, 0).sum() for name, x in per_image.items()}
    return {**sums, "count": valid.astype(jnp.int32).sum()}


def from_sums(sums: Mapping[str, Array]) -> dict[str, float | int]:
    """The values of `summarize` from (added) results of `overlap_sums`, on the host."""
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
    """Counts of single images (scalars each) as one `Overlap` of int64 arrays (N,)."""
    return Overlap(*(np.asarray(field, np.int64) for field in zip(*counts, strict=True)))


def take(counts: Overlap, rows: np.ndarray) -> Overlap:
    """The counts of some images: `rows` is a boolean mask (N,) or indices."""
    return Overlap(*(np.asarray(field)[rows] for field in counts))
