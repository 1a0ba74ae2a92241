"""Whether a model treats left and right alike, as training on flipped pictures should make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from biclip_jax.data import pipeline
from biclip_jax.data import text as text_lib
from biclip_jax.data.schema import Record
from biclip_jax.evaluation.metrics import overlap


def count_agreement(
    predict: Callable[[Any], np.ndarray],
    encode: Callable[[Sequence[str]], Mapping[str, np.ndarray]],
    records: Sequence[Record],
    batch_size: int,
) -> overlap.Overlap:
    """The mask of each mirrored picture and sentence against the mirrored mask of the right ones.

    At the model's own size; Dice 1 is a model for which left and right are the same.

    Args:
      predict: batch -> probabilities (B, S, S, 1).
      encode: sentences -> the sentence fields of a batch.
      records: N of them.
      batch_size: pictures at a time.

    Returns:
      Counts (N,): the mirrored pass is the prediction, the right one the mask.
    """
    prompts = [record["text"] for record in records]
    flipped = [Record({**record, "image": record["image"][:, ::-1]}) for record in records]
    original = _masks(predict, dict(encode(prompts)), records, batch_size)
    swapped = dict(encode([text_lib.swap_sides(prompt) for prompt in prompts]))
    return overlap.count_pixels(_masks(predict, swapped, flipped, batch_size), original[:, :, ::-1])


def _masks(predict, texts, records, batch_size) -> np.ndarray:
    rows = [
        (predict(batch) >= overlap.THRESHOLD)[batch["valid"]]
        for batch in pipeline.eval_batches(records, texts, batch_size=batch_size)
    ]
    return np.concatenate(rows)
