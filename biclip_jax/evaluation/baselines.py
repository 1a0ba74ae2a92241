"""Image-free baselines: mean masks of the training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from biclip_jax.data.image_io import resize_probability
from biclip_jax.data.schema import Record
from biclip_jax.evaluation.metrics import overlap

THRESHOLDS = np.linspace(0.05, 0.95, 19)


def mean_masks(records: Sequence[Record]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the mean mask (S, S) of all records, and of the records with the same prompt."""
    total = np.zeros(records[0]["mask"].shape[:2])
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for record in records:
        mask, text = record["mask"][..., 0], record["text"]
        total += mask
        sums[text] = sums.get(text, 0) + mask.astype(np.float64)
        counts[text] = counts.get(text, 0) + 1
    return total / len(records), {text: sums[text] / counts[text] for text in sums}


def image_free(
    train: Sequence[Record], val: Sequence[Record], test: Sequence[Record]
) -> dict[str, overlap.Overlap]:
    """Evaluates both image-free baselines on `test`.

    `mean_mask` predicts the mean training mask for every image. `mean_mask_per_prompt` predicts the
    mean over the training images with the same prompt, or over all of them for a new prompt. The
    threshold of each is the one of `THRESHOLDS` with the best global Dice on `val`.
    """
    prior, per_prompt = mean_masks(train)
    counts = {}
    for name, table in (("mean_mask", {}), ("mean_mask_per_prompt", per_prompt)):
        scores = [_dice_global(prior, table, val, threshold) for threshold in THRESHOLDS]
        best = THRESHOLDS[int(np.argmax(scores))]
        counts[name] = _overlap(prior, table, test, best)
    return counts


def _dice_global(prior, table, records, threshold) -> float:
    return float(overlap.summarize(_overlap(prior, table, records, threshold))["dice_global"])


def _overlap(
    prior: np.ndarray, table: Mapping[str, np.ndarray], records: Sequence[Record], threshold: float
) -> overlap.Overlap:
    """Counts pixels at each mask's own size; resizes the prediction of a prompt once per size."""
    predictions: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
    rows = []
    for record in records:
        full = record["full_mask"]
        key = (record["text"] if record["text"] in table else "", full.shape)
        if key not in predictions:
            probs = table.get(key[0], prior)
            predictions[key] = resize_probability(probs, full.shape[0], full.shape[1]) >= threshold
        rows.append(overlap.count_pixels(predictions[key][..., None], full, axis=(0, 1, 2)))
    return overlap.stack(rows)
