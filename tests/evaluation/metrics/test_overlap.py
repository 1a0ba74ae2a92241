"""Dice and IoU against SciPy, worked examples and plain loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial import distance

from biclip_jax.evaluation.metrics import overlap

NAMES = ("dice_global", "iou_global", "dice_mean", "iou_mean")


def random_masks(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns (num, 12, 10, 1) bool pairs of various densities, none empty."""
    rng = np.random.default_rng(seed)
    density = rng.uniform(0.05, 0.9, (num, 1, 1, 1))
    mask = rng.random((num, 12, 10, 1)) < density
    pred = mask ^ (rng.random(mask.shape) < 0.2)
    pred[:, 0, 0] = mask[:, 1, 1] = True
    return pred, mask


def random_counts(num: int, seed: int = 0) -> overlap.Overlap:
    return overlap.count_pixels(*random_masks(num, seed))


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_per_image_values_equal_scipy(to_array, dtype):
    pred, mask = random_masks(500)
    counts = overlap.count_pixels(to_array(pred.astype(dtype)), to_array(mask.astype(dtype)))
    pairs = [(p.ravel(), m.ravel()) for p, m in zip(pred, mask, strict=True)]
    np.testing.assert_allclose(
        overlap.dice(counts), [1 - distance.dice(p, m) for p, m in pairs], rtol=1e-6
    )
    np.testing.assert_allclose(
        overlap.iou(counts), [1 - distance.jaccard(p, m) for p, m in pairs], rtol=1e-6
    )
    assert isinstance(counts.intersection, type(to_array(pred)))


def test_summary_pools_pixels_for_global_and_averages_images_for_mean():
    pred, mask = random_masks(500)
    summary = overlap.summarize(overlap.count_pixels(pred, mask))
    per_image = [1 - distance.dice(p.ravel(), m.ravel()) for p, m in zip(pred, mask, strict=True)]
    assert summary["dice_global"] == pytest.approx(1 - distance.dice(pred.ravel(), mask.ravel()))
    assert summary["iou_global"] == pytest.approx(1 - distance.jaccard(pred.ravel(), mask.ravel()))
    assert summary["dice_mean"] == pytest.approx(np.mean(per_image))
    assert summary["num_images"] == 500
    assert tuple(summary) == (*NAMES, "num_images")
    assert {type(summary[name]) for name in NAMES} == {float}


def test_global_iou_follows_from_global_dice_and_the_mean_does_not():
    summary = overlap.summarize(random_counts(200, seed=3))
    d, mean = summary["dice_global"], summary["dice_mean"]
    assert summary["iou_global"] == pytest.approx(d / (2 - d), abs=1e-12)
    assert abs(summary["iou_mean"] - mean / (2 - mean)) > 1e-3


def test_worked_example_separates_global_from_mean():
    counts = overlap.Overlap(np.array([90, 0]), np.array([100, 10]), np.array([100, 10]))
    summary = overlap.summarize(counts)
    assert summary["dice_global"] == pytest.approx(180 / 220)
    assert summary["iou_global"] == pytest.approx(90 / 130)
    assert summary["dice_mean"] == pytest.approx(0.45)
    assert summary["iou_mean"] == pytest.approx(90 / 110 / 2)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_two_empty_masks_score_one_and_one_empty_mask_zero(xp):
    empty, full = xp.zeros((1, 4, 4, 1), bool), xp.ones((1, 4, 4, 1), bool)
    for pred, mask, expected in ((empty, empty, 1), (full, empty, 0), (empty, full, 0)):
        counts = overlap.count_pixels(pred, mask)
        assert float(overlap.dice(counts)[0]) == expected
        assert float(overlap.iou(counts)[0]) == expected
    summary = overlap.summarize(overlap.count_pixels(empty, empty))
    assert [summary[name] for name in NAMES] == [1.0] * 4


def test_rejects_different_shapes_and_empty_splits():
    with pytest.raises(ValueError, match="expected one shape"):
        overlap.count_pixels(np.ones((2, 4, 4, 1)), np.ones((2, 4, 4)))
    with pytest.raises(ValueError, match="N >= 1"):
        overlap.summarize(overlap.Overlap(*np.zeros((3, 0), int)))


def test_other_axes():
    pred, mask = random_masks(6)
    counts = overlap.count_pixels(pred[..., 0], mask[..., 0], axis=(1, 2))
    np.testing.assert_array_equal(counts, overlap.count_pixels(pred, mask))
    np.testing.assert_array_equal(
        overlap.count_pixels(pred[0].ravel(), mask[0].ravel(), axis=0), [c[0] for c in counts]
    )


def test_bootstrap_equals_a_plain_loop_over_the_same_indices():
    counts = random_counts(25, seed=1)
    rows = np.random.default_rng(7).integers(25, size=(60, 25))
    resampled = [overlap.summarize(overlap.Overlap(*(c[r] for c in counts))) for r in rows]
    intervals = overlap.bootstrap_intervals(counts, num_resamples=60, level=0.9, seed=7)
    assert tuple(intervals) == NAMES
    for name in NAMES:
        values = [summary[name] for summary in resampled]
        assert intervals[name] == pytest.approx(np.percentile(values, [5, 95]).tolist(), abs=1e-12)


def test_bootstrap_is_reproducible_and_depends_on_seed_and_level():
    counts = random_counts(40)
    first = overlap.bootstrap_intervals(counts, seed=1)
    assert first == overlap.bootstrap_intervals(counts, seed=1)
    assert first != overlap.bootstrap_intervals(counts, seed=2)
    narrow = overlap.bootstrap_intervals(counts, seed=1, level=0.5)
    assert all(first[n][0] < narrow[n][0] < narrow[n][1] < first[n][1] for n in NAMES)


def test_bootstrap_intervals_have_the_nominal_coverage():
    population = random_counts(5000, seed=4)
    truth = overlap.summarize(population)
    rng = np.random.default_rng(5)
    hits = dict.fromkeys(NAMES, 0)
    for trial in range(200):
        rows = rng.integers(5000, size=80)
        sample = overlap.Overlap(*(count[rows] for count in population))
        intervals = overlap.bootstrap_intervals(sample, num_resamples=300, seed=trial)
        for name, (low, high) in intervals.items():
            hits[name] += low <= truth[name] <= high
    assert all(0.88 <= hits[name] / 200 <= 0.99 for name in NAMES), hits


def test_sums_of_padded_batches_give_the_summary_of_the_real_images():
    pred, mask = random_masks(10)
    probs = np.where(pred, 0.7, 0.2).astype(np.float32)
    padded = np.concatenate([probs, np.full_like(probs[:2], np.nan)])
    padded_mask = np.concatenate([mask, np.ones_like(mask[:2])])
    valid = np.arange(12) < 10
    step = jax.jit(overlap.overlap_sums)
    parts = [step(padded[i : i + 4], padded_mask[i : i + 4], valid[i : i + 4]) for i in (0, 4, 8)]
    sums = jax.tree.map(lambda *xs: sum(xs), *parts)
    expected = overlap.summarize(overlap.count_pixels(pred, mask))
    assert overlap.from_sums(sums) == pytest.approx(expected, rel=1e-6)
    assert overlap.from_sums(sums)["num_images"] == 10


def test_sums_add_over_devices():
    pred, mask = random_masks(8)
    args = [x.reshape(4, 2, 12, 10, 1) for x in (pred.astype(np.float32), mask)]
    valid = np.ones((4, 2), bool)

    def step(*batch):
        return jax.lax.psum(overlap.overlap_sums(*batch), "batch")

    summed = jax.tree.map(lambda x: x[0], jax.vmap(step, axis_name="batch")(*args, valid))
    single = overlap.overlap_sums(args[0].reshape(pred.shape), mask, np.ones(8, bool))
    for name, value in single.items():
        np.testing.assert_allclose(summed[name], value, rtol=1e-6)
    assert summed["intersection"].dtype == jnp.int32


def test_threshold_is_inclusive():
    probs = jnp.array([0.29, 0.3, 0.5, 0.9]).reshape(1, 2, 2, 1)
    mask, valid = jnp.ones((1, 2, 2, 1), bool), jnp.array([True])
    assert int(overlap.overlap_sums(probs, mask, valid)["pred_area"]) == 2
    assert int(overlap.overlap_sums(probs, mask, valid, threshold=0.3)["pred_area"]) == 3


def test_rejects_sums_without_a_valid_image():
    empty = jnp.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match="at least one valid"):
        overlap.from_sums(overlap.overlap_sums(empty, empty, jnp.zeros(2, bool)))
