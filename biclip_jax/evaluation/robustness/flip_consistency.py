"""Flip consistency: agreement between predictions on original and on flipped images."""

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
    """Compares the masks of flipped images and swapped prompts with the flipped original masks.

    At model resolution. Dice 1 means that the model is equivariant to a left-right flip.

    Args:
      predict: Function from a batch to probabilities (B, S, S, 1).
      encode: Function from prompts to the text fields of a batch.
      records: N records.
      batch_size: Images per batch.

    Returns:
      Counts (N,), with the flipped pass as prediction and the original pass as mask.
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
