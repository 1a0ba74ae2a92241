"""Training order: epochs, seeds, epoch boundaries, and a frozen reference."""

import numpy as np
import pytest

from biclip_jax.data import sampler

FROZEN = [3, 4, 1, 0, 2]  # epoch 2 of five records, seed 7


@pytest.mark.parametrize(("size", "num"), [(4, 10), (7, 5), (5, 5), (3, 1)])
def test_every_record_occurs_once_per_epoch(size, num):
    steps = [sampler.batch_rows(step, size, num, seed=3) for step in range(3 * num)]
    assert all(rows.shape == (size,) for rows in steps)
    for epoch in np.concatenate(steps).reshape(-1, num):
        assert sorted(epoch) == list(range(num))


def test_order_is_a_pure_function_of_epoch_and_seed():
    first = sampler.batch_rows(0, 50, 50, 0)
    assert first.tolist() != sampler.batch_rows(1, 50, 50, 0).tolist()
    assert first.tolist() != sampler.batch_rows(0, 50, 50, 1).tolist()
    np.testing.assert_array_equal(first, sampler.batch_rows(0, 50, 50, 0))
    # The stream does not depend on the batch size.
    parts = [sampler.batch_rows(step, 25, 50, 0) for step in (0, 1)]
    np.testing.assert_array_equal(first, np.concatenate(parts))


def test_order_is_that_of_numpys_frozen_stream():
    """A run that resumes with another version of NumPy sees the same images."""
    assert sampler.batch_rows(2, 5, 5, 7).tolist() == FROZEN
    expected = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([7, 2])))
    assert expected.permutation(5).tolist() == FROZEN


def test_accepts_negative_seeds():
    assert sorted(sampler.batch_rows(0, 6, 6, -1)) == list(range(6))


def test_unlabelled_records_fill_the_rest_of_the_batch():
    rows = sampler.training_rows(1, 6, 10, seed=0, num_labelled=4, labelled_rows=2)
    np.testing.assert_array_equal(rows[:2], sampler.batch_rows(1, 2, 4, 0))
    np.testing.assert_array_equal(rows[2:], 4 + sampler.batch_rows(1, 4, 6, 0))
    labelled_only = sampler.training_rows(1, 6, 10, seed=0, num_labelled=10, labelled_rows=6)
    np.testing.assert_array_equal(labelled_only, sampler.batch_rows(1, 6, 10, 0))
