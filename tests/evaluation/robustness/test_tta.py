"""Test-time augmentation with stub predictors."""

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
    """Depends on each pixel only, hence equivariant to every transform."""
    image = batch["image"].astype(np.float32)
    return np.float32(0.02) + np.float32(0.96) * (image / 255) ** 2


def sided(batch):
    """Predicts the half named in the prompt: 1 left, 2 right."""
    probs = np.full((*batch["image"].shape[:3], 1), 0.1, np.float32)
    for row, token in enumerate(batch["text_ids"][:, 0]):
        half = slice(0, SIDE // 2) if token == 1 else slice(SIDE // 2, SIDE)
        probs[row, :, half] = 0.9
    return probs


def test_the_identity_view_returns_the_prediction():
    result = tta.predict_views(pixelwise, batch(), [IDENTITY])
    np.testing.assert_array_equal(result[..., :1], pixelwise(batch()))
    expected = [[stats.entropy([p, 1 - p]) for p in row] for row in result[0, :, :, 0]]
    np.testing.assert_allclose(result[0, :, :, 1], expected, atol=1e-6)
    np.testing.assert_allclose(result[..., 2], 0, atol=1e-7)


@pytest.mark.parametrize("predict", [pixelwise, sided])
def test_flips_do_not_change_an_equivariant_model(predict):
    result = tta.predict_views(predict, batch(), [IDENTITY, FLIP])
    np.testing.assert_array_equal(result[..., :1], predict(batch()))
    np.testing.assert_allclose(result[..., 2], 0, atol=1e-7)


def test_a_model_that_ignores_the_prompt_disagrees_between_views():
    def left_only(batch):
        return sided({**batch, "text_ids": np.ones_like(batch["text_ids"])})

    result = tta.predict_views(left_only, batch(), [IDENTITY, FLIP])
    np.testing.assert_allclose(result[..., 0], 0.5, atol=1e-6)
    np.testing.assert_allclose(result[..., 1], np.log(2), atol=1e-6)
    np.testing.assert_allclose(result[..., 2], np.log(2) - stats.entropy([0.1, 0.9]), atol=1e-5)


def test_members_are_averaged_and_mutual_information_is_entropy_minus_mean_entropy():
    def member(p):
        return lambda batch: np.full((*batch["image"].shape[:3], 1), p, np.float32)

    result = tta.predict_members([member(0.1), member(0.2), member(0.9)], batch())
    assert result.shape == (3, SIDE, SIDE, 6)
    aleatoric = np.mean([stats.entropy([p, 1 - p]) for p in (0.1, 0.2, 0.9)])
    total = stats.entropy([0.4, 0.6])
    expected = [0.4, total, total - aleatoric, 0.1, 0.2, 0.9]
    np.testing.assert_allclose(result[0, 0, 0], expected, atol=1e-6)
    equal = tta.predict_members([pixelwise, pixelwise], batch())
    np.testing.assert_array_equal(equal[..., 0], pixelwise(batch())[..., 0])
    np.testing.assert_allclose(equal[..., 2], 0, atol=1e-7)


def test_views_do_not_change_a_constant_model():
    def constant(batch):
        return np.full((*batch["image"].shape[:3], 1), 0.3, np.float32)

    result = tta.predict_views(constant, batch(), list(tta.VIEWS.values()))
    np.testing.assert_allclose(result[..., 0], 0.3, atol=1e-6)
    np.testing.assert_allclose(result[..., 2], 0, atol=1e-6)


def test_views_change_only_image_and_prompt_and_are_deterministic():
    views = []

    def recording(batch):
        views.append(batch)
        return pixelwise(batch)

    inputs = batch()
    before = copy.deepcopy(inputs)
    first = tta.predict_views(recording, inputs, list(tta.VIEWS.values()))
    second = tta.predict_views(recording, inputs, list(tta.VIEWS.values()))
    np.testing.assert_array_equal(first, second)
    for name in before:
        np.testing.assert_array_equal(inputs[name], before[name])
    assert [int(b["text_ids"][0, 0]) for b in views[:6]] == [1, 2, 1, 1, 1, 1]
    assert all(set(b) == {"image", "text_ids"} and b["image"].dtype == np.float32 for b in views)
    np.testing.assert_array_equal(views[1]["image"], inputs["image"][:, :, ::-1])


def test_rotation_equals_scipy_and_is_counter_clockwise():
    image = np.random.default_rng(3).random((2, SIDE, SIDE, 2)).astype(np.float32)
    inside = slice(4, -4)
    expected = ndimage.rotate(image, 10, axes=(1, 2), reshape=False, order=1)
    result = tta.rotate(image, 10)
    np.testing.assert_allclose(result[:, inside, inside], expected[:, inside, inside], atol=1e-4)
    impulse = np.zeros((1, 9, 9, 1), np.float32)
    impulse[0, 4, 8] = 1
    # From the right to the top.
    assert tta.rotate(impulse, 90)[0, 0, 4, 0] == pytest.approx(1, abs=1e-5)


def test_rotated_probabilities_are_rotated_back_and_corners_do_not_fade():
    disc = np.hypot(*(np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2 - np.array([4, -3])[:, None, None]))
    inputs = batch(1)
    inputs["image"] = (255 * np.exp(-(disc**2) / 18))[None, :, :, None].astype(np.uint8)
    result = tta.predict_views(pixelwise, inputs, [IDENTITY, tta.VIEWS["rotation_plus_10"]])
    np.testing.assert_allclose(result[..., :1], pixelwise(inputs), atol=0.06)
    np.testing.assert_allclose(result[0, 0, 0, 0], 0.02, atol=1e-6)


def test_views_are_weighted_by_their_coverage_of_a_pixel():
    probabilities = iter([0.1, 0.9])

    def alternating(batch):
        return np.full((*batch["image"].shape[:3], 1), next(probabilities), np.float32)

    result = tta.predict_views(alternating, batch(1), [IDENTITY, tta.VIEWS["rotation_plus_10"]])
    coverage = tta.rotate(np.ones((1, SIDE, SIDE, 1), np.float32), -10)[..., 0].astype(np.float64)
    assert ((coverage > 0.1) & (coverage < 0.9)).any() and (coverage == 0).any()
    mean = (0.1 + 0.9 * coverage) / (1 + coverage)
    np.testing.assert_allclose(result[..., 0], mean, atol=1e-6)
    total = stats.entropy([mean, 1 - mean])
    np.testing.assert_allclose(result[..., 2], total - stats.entropy([0.1, 0.9]), atol=1e-6)


def test_contrast_keeps_the_mean_and_the_range():
    image = np.random.default_rng(0).uniform(60, 200, (2, 8, 8, 1)).astype(np.float32)
    low = tta.contrast(image, 0.9)
    np.testing.assert_allclose(low.mean((1, 2, 3)), image.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(low.std((1, 2, 3)), 0.9 * image.std((1, 2, 3)), rtol=1e-4)
    extreme = tta.contrast(np.array([[[[0.0], [255.0]]]], np.float32), 1.1)
    assert extreme.min() == 0 and extreme.max() == 255


def test_rejects_views_that_do_not_cover_the_image():
    with pytest.raises(ValueError, match="add identity"):
        tta.predict_views(pixelwise, batch(1), [tta.VIEWS["rotation_plus_10"]])
