"""The order of training: which records make which batch, a pure function of the seed."""

from __future__ import annotations

import functools

import numpy as np


def batch_rows(step: int, size: int, num_records: int, seed: int) -> np.ndarray:
    """Records of one batch out of an endless stream of epochs, each in another order.

    Batches run across the edges of epochs, so that every record is met once an epoch.

    Args:
      step: from 0.
      size: records a batch.
      num_records: of an epoch.
      seed: of the order.

    Returns:
      (size,) int64 in [0, num_records).
    """
    epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), num_records)
    rows = [_epoch(int(e), num_records, seed)[places[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(rows)


def training_rows(
    step: int, size: int, num_records: int, seed: int, num_labelled: int, labelled_rows: int
) -> np.ndarray:
    """Records of one batch, first those with masks, then those without.

    Args:
      step, size, num_records, seed: as for `batch_rows`.
      num_labelled: of the records, the first ones.
      labelled_rows: of the batch; `size` where no record is without a mask.

    Returns:
      (size,) int64.
    """
    rows = batch_rows(step, labelled_rows, num_labelled, seed)
    if labelled_rows == size:
        return rows
    others = batch_rows(step, size - labelled_rows, num_records - num_labelled, seed)
    return np.concatenate([rows, num_labelled + others])


@functools.lru_cache(maxsize=16)  # of several members, and of two epochs at the edge of one
def _epoch(epoch: int, num_records: int, seed: int) -> np.ndarray:
    # RandomState's streams are frozen: the same order from any version of NumPy.
    bits = np.random.MT19937(np.random.SeedSequence([seed % 2**32, epoch]))
    return np.random.RandomState(bits).permutation(num_records)
