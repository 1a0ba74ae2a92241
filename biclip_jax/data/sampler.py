"""Training order: the records of each batch, as a pure function of seed and step."""

from __future__ import annotations

import functools

import numpy as np


def batch_rows(step: int, size: int, num_records: int, seed: int) -> np.ndarray:
    """Returns the records of one batch from an endless sequence of differently shuffled epochs.

    Batches may span two epochs, so that each record occurs exactly once per epoch.

    Args:
      step: Step, from 0.
      size: Batch size.
      num_records: Number of records per epoch.
      seed: Seed of the order.

    Returns:
      (size,) int64 in [0, num_records).
    """
    epochs, positions = np.divmod(np.arange(step * size, (step + 1) * size), num_records)
    rows = [_epoch(int(e), num_records, seed)[positions[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(rows)


def training_rows(
    step: int, size: int, num_records: int, seed: int, num_labelled: int, labelled_rows: int
) -> np.ndarray:
    """Returns the records of one batch, labelled ones first.

    Args:
      step, size, num_records, seed: See `batch_rows`.
      num_labelled: Number of labelled records, which are the first ones.
      labelled_rows: Number of labelled rows in the batch; `size` if all records are labelled.

    Returns:
      (size,) int64.
    """
    rows = batch_rows(step, labelled_rows, num_labelled, seed)
    if labelled_rows == size:
        return rows
    unlabelled = batch_rows(step, size - labelled_rows, num_records - num_labelled, seed)
    return np.concatenate([rows, num_labelled + unlabelled])


@functools.lru_cache(maxsize=16)  # several ensemble members, and two epochs at a boundary
def _epoch(epoch: int, num_records: int, seed: int) -> np.ndarray:
    # RandomState's streams are frozen: every version of NumPy gives the same order.
    bits = np.random.MT19937(np.random.SeedSequence([seed % 2**32, epoch]))
    return np.random.RandomState(bits).permutation(num_records)
