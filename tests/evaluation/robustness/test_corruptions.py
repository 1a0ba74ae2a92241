"""Corruptions against NumPy, SciPy and Pillow; results do not depend on the batch."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from biclip_jax.data import label_subset
from biclip_jax.evaluation.robustness import corruptions

IDS = ["a", "b", "covid_1"]


@pytest.fixture(scope="module")
def image():
    return jnp.asarray(np.random.default_rng(0).random((3, 56, 56, 1)), jnp.float32)


def corrupted(name, severity, image, seed=0):
    hashes = jnp.asarray(label_subset.hash_ids(IDS[: len(image)]))
    return corruptions.on_device(name, severity, seed)(image, hashes)


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_each_severity_changes_the_image_more_than_the_previous_one(name):
    noise = np.random.default_rng(0).random((2, 64, 64, 1))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2, 0))
    image = jnp.asarray((smooth - smooth.min()) / np.ptp(smooth), jnp.float32)
    changes = []
    for severity in corruptions.SEVERITIES:
        result = corrupted(name, severity, image)
        assert result.shape == image.shape and result.dtype == jnp.float32
        assert float(result.min()) >= 0 and float(result.max()) <= 1 + 1e-6
        changes.append(float(jnp.abs(result - image).mean()))
    assert changes == sorted(changes) and changes[0] > 0


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_a_corruption_is_deterministic_and_independent_of_the_batch(name, image):
    batch = corrupted(name, 3, image)
    np.testing.assert_array_equal(batch, corrupted(name, 3, image))
    np.testing.assert_allclose(batch[:1], corrupted(name, 3, image[:1]), atol=1e-6)


@pytest.mark.parametrize("name", ["gaussian_noise", "low_dose_ct"])
def test_noise_depends_on_id_name_severity_and_seed(name, image):
    same = jnp.broadcast_to(image[:1], image.shape)
    result = corrupted(name, 2, same)
    assert not np.array_equal(result[0], result[1])
    assert not np.array_equal(result, corrupted(name, 2, same, seed=1))
    keys = {
        tuple(np.asarray(jax.random.key_data(key)).tolist())
        for other in corruptions.NAMES
        for severity in corruptions.SEVERITIES
        for key in corruptions.example_keys(
            jnp.asarray(label_subset.hash_ids(IDS)), other, severity
        )
    }
    assert len(keys) == len(corruptions.NAMES) * 5 * len(IDS)


def test_gaussian_noise_has_the_documented_deviation():
    constant = jnp.full((1, 224, 224, 1), 0.5)
    assert float(corrupted("gaussian_noise", 3, constant).std()) == pytest.approx(0.1, rel=0.02)


def test_motion_blur_is_the_mean_along_the_diagonal():
    image = np.random.default_rng(1).random((1, 224, 224, 1)).astype(np.float32)
    result = np.asarray(corrupted("motion_blur", 2, jnp.asarray(image)))[0, ..., 0]
    step = np.sqrt(0.5) * (np.arange(7) - 3)
    for y, x in ((100, 50), (30, 200)):
        samples = ndimage.map_coordinates(image[0, ..., 0], [y - step, x + step], order=1)
        assert result[y, x] == pytest.approx(samples.mean(), abs=1e-5)


def test_gaussian_blur_equals_scipy():
    image = np.random.default_rng(1).random((1, 224, 224, 1)).astype(np.float32)
    for severity, sd in enumerate((0.5, 1, 2, 3, 4), 1):
        expected = ndimage.gaussian_filter(image[0, ..., 0], sd, mode="nearest", truncate=4)
        result = corrupted("gaussian_blur", severity, jnp.asarray(image))[0, ..., 0]
        np.testing.assert_allclose(result, expected, atol=2e-5)


def test_lengths_scale_with_the_image_size():
    impulse = np.zeros((1, 112, 112, 1), np.float32)
    impulse[0, 56, 56] = 1
    expected = ndimage.gaussian_filter(impulse[0, ..., 0], 2, mode="nearest")
    result = corrupted("gaussian_blur", 5, jnp.asarray(impulse))[0, ..., 0]
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_contrast_gamma_and_downsampling_by_hand(image):
    x = np.asarray(image)
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(corrupted("low_contrast", 3, image), (mean + x) / 2, atol=1e-6)
    np.testing.assert_allclose(corrupted("gamma", 2, image), np.sqrt(x), atol=1e-6)
    # Without antialiasing, a factor of 2 samples the center of 2x2 blocks.
    centers = x.reshape(3, 28, 2, 28, 2, 1).mean(axis=(2, 4))
    upsampled = np.stack(
        [ndimage.zoom(m, (2, 2, 1), order=1, grid_mode=True, mode="nearest") for m in centers]
    )
    np.testing.assert_allclose(corrupted("downsample", 2, image), upsampled, atol=1e-5)


def test_low_dose_noise_has_the_deviation_of_photon_counting():
    constant = jnp.full((1, 224, 224, 1), 0.5)
    result = np.asarray(corrupted("low_dose_ct", 3, constant))
    expected = 1e4 * np.exp(-2)
    # Standard deviation of -log(n / I0) / 4 for n with mean N and variance N + 100.
    spread = np.sqrt(expected + 100) / expected / 4
    assert result.mean() == pytest.approx(0.5, abs=1e-3)
    assert result.std() == pytest.approx(spread, rel=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_equals_pillow(channels):
    image = np.random.default_rng(0).integers(0, 256, (40, 56, channels)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "JPEG", quality=15)
    expected = np.asarray(Image.open(buffer)).reshape(image.shape)
    np.testing.assert_array_equal(corruptions.jpeg(image, 4), expected)


def test_ids_are_hashed_by_sha256():
    # sha256("a") begins with ca978112
    assert label_subset.hash_ids(["a"])[0] == 0xCA978112
