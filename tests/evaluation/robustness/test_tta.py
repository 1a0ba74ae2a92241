"""Test-time augmentation with predictors whose answers are known."""

import copy

import numpy as np
import pytest
from scipy import ndimage, stats

from biclip_jax.evaluation.robustness import tta

IDENTITY, FLIP = tta.VIEWS["identity"], tta.VIEWS["horizontal_flip"]
SIDE = 24


def batch(size=3, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, SIDE, SIDE, 1)).astype(np.uint8)
    return {
        "image": image,
        "text_ids": np.full((size, 1), 1, np.int32),
        "swapped_text_ids": np.full((size, 1), 2, np.int32),
    }


def pixelwise(batch):
    """Equivariant to every geometry: a function of each pixel alone."""
    image = batch["image"].astype(np.float32)
    return np.float32(0.02) + np.float32(0.96) * (image / 255) ** 2


def sided(batch):
    """The half that the sentence names (1 left, 2 right): the mirror of left is right."""
    probs = np.full((*batch["image"].shape[:3], 1), 0.1, np.float32)
    for row, token in enumerate(batch["text_ids"][:, 0]):
        half = slice(0, SIDE // 2) if token == 1 else slice(SIDE // 2, SIDE)
        probs[row, :, half] = 0.9
    return probs


def test_identity_alone_is_the_prediction_itself():
    found = tta.predict_views(pixelwise, batch(), [IDENTITY])
    np.testing.assert_array_equal(found[..., :1], pixelwise(batch()))
    expected = [[stats.entropy([p, 1 - p]) for p in row] for row in found[0, :, :, 0]]
    np.testing.assert_allclose(found[0, :, :, 1], expected, atol=1e-6)
    np.testing.assert_allclose(found[..., 2], 0, atol=1e-7)


@pytest.mark.parametrize("predict", [pixelwise, sided])
def test_a_model_that_follows_flips_and_sentences_is_unchanged_by_them(predict):
    found = tta.predict_views(predict, batch(), [IDENTITY, FLIP])
    np.testing.assert_array_equal(found[..., :1], predict(batch()))
    np.testing.assert_allclose(found[..., 2], 0, atol=1e-7)


def test_a_model_that_ignores_the_flip_is_torn():
    def stubborn(batch):
        return sided({**batch, "text_ids": np.ones_like(batch["text_ids"])})

    found = tta.predict_views(stubborn, batch(), [IDENTITY, FLIP])
    np.testing.assert_allclose(found[..., 0], 0.5, atol=1e-6)
    np.testing.assert_allclose(found[..., 1], np.log(2), atol=1e-6)
    np.testing.assert_allclose(found[..., 2], np.log(2) - stats.entropy([0.1, 0.9]), atol=1e-5)


def test_members_are_averaged_and_their_disagreement_is_what_the_mean_adds():
    def member(p):
        return lambda batch: np.full((*batch["image"].shape[:3], 1), p, np.float32)

    found = tta.predict_members([member(0.1), member(0.2), member(0.9)], batch())
    assert found.shape == (3, SIDE, SIDE, 6)
    own = np.mean([stats.entropy([p, 1 - p]) for p in (0.1, 0.2, 0.9)])
    whole = stats.entropy([0.4, 0.6])
    np.testing.assert_allclose(found[0, 0, 0], [0.4, whole, whole - own, 0.1, 0.2, 0.9], atol=1e-6)
    alike = tta.predict_members([pixelwise, pixelwise], batch())
    np.testing.assert_array_equal(alike[..., 0], pixelwise(batch())[..., 0])
    np.testing.assert_allclose(alike[..., 2], 0, atol=1e-7)


def test_a_constant_model_is_unaffected_by_all_views():
    def constant(batch):
        return np.full((*batch["image"].shape[:3], 1), 0.3, np.float32)

    found = tta.predict_views(constant, batch(), list(tta.VIEWS.values()))
    np.testing.assert_allclose(found[..., 0], 0.3, atol=1e-6)
    np.testing.assert_allclose(found[..., 2], 0, atol=1e-6)


def test_views_change_the_picture_and_nothing_else_and_twice_alike():
    seen = []

    def noting(batch):
        seen.append(batch)
        return pixelwise(batch)

    given = batch()
    before = copy.deepcopy(given)
    first = tta.predict_views(noting, given, list(tta.VIEWS.values()))
    again = tta.predict_views(noting, given, list(tta.VIEWS.values()))
    np.testing.assert_array_equal(first, again)
    for name in before:
        np.testing.assert_array_equal(given[name], before[name])
    assert [int(b["text_ids"][0, 0]) for b in seen[:6]] == [1, 2, 1, 1, 1, 1]
    assert all(set(b) == {"image", "text_ids"} and b["image"].dtype == np.float32 for b in seen)
    np.testing.assert_array_equal(seen[1]["image"], given["image"][:, :, ::-1])


def test_rotation_is_scipys_and_turns_counter_clockwise():
    image = np.random.default_rng(3).random((2, SIDE, SIDE, 2)).astype(np.float32)
    inside = slice(4, -4)
    expected = ndimage.rotate(image, 10, axes=(1, 2), reshape=False, order=1)
    found = tta.rotate(image, 10)
    np.testing.assert_allclose(found[:, inside, inside], expected[:, inside, inside], atol=1e-4)
    right = np.zeros((1, 9, 9, 1), np.float32)
    right[0, 4, 8] = 1
    assert tta.rotate(right, 90)[0, 0, 4, 0] == pytest.approx(1, abs=1e-5)  # to the top


def test_rotated_probabilities_come_back_to_their_place_and_corners_do_not_fade():
    disc = np.hypot(*(np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2 - np.array([4, -3])[:, None, None]))
    given = batch(1)
    given["image"] = (255 * np.exp(-(disc**2) / 18))[None, :, :, None].astype(np.uint8)
    found = tta.predict_views(pixelwise, given, [IDENTITY, tta.VIEWS["rotation_plus_10"]])
    np.testing.assert_allclose(found[..., :1], pixelwise(given), atol=0.06)
    np.testing.assert_allclose(found[0, 0, 0, 0], 0.02, atol=1e-6)


def test_a_view_counts_with_the_share_of_the_pixel_that_it_saw():
    answers = iter([0.1, 0.9])

    def changing(batch):
        return np.full((*batch["image"].shape[:3], 1), next(answers), np.float32)

    found = tta.predict_views(changing, batch(1), [IDENTITY, tta.VIEWS["rotation_plus_10"]])
    seen = tta.rotate(np.ones((1, SIDE, SIDE, 1), np.float32), -10)[..., 0].astype(np.float64)
    assert ((seen > 0.1) & (seen < 0.9)).any() and (seen == 0).any()
    mean = (0.1 + 0.9 * seen) / (1 + seen)
    np.testing.assert_allclose(found[..., 0], mean, atol=1e-6)
    ensemble_with = stats.entropy([mean, 1 - mean])
    np.testing.assert_allclose(found[..., 2], ensemble_with - stats.entropy([0.1, 0.9]), atol=1e-6)


def test_contrast_keeps_the_mean_of_mid_grey_and_stays_in_range():
    image = np.random.default_rng(0).uniform(60, 200, (2, 8, 8, 1)).astype(np.float32)
    low = tta.contrast(image, 0.9)
    np.testing.assert_allclose(low.mean((1, 2, 3)), image.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(low.std((1, 2, 3)), 0.9 * image.std((1, 2, 3)), rtol=1e-4)
    extreme = tta.contrast(np.array([[[[0.0], [255.0]]]], np.float32), 1.1)
    assert extreme.min() == 0 and extreme.max() == 255


def test_views_that_leave_a_corner_unseen_are_refused():
    with pytest.raises(ValueError, match="add identity"):
        tta.predict_views(pixelwise, batch(1), [tta.VIEWS["rotation_plus_10"]])
