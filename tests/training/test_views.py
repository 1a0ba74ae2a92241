"""Views: geometry against SciPy, exact flips, joint transforms, photometric ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from biclip_jax.training import views

RNG = np.random.default_rng(0)
IMAGE = jnp.asarray(RNG.random((16, 20, 3)), jnp.float32)
# Compiled, because one program takes less time than dozens of small ones.
transform = jax.jit(views.transform, static_argnums=2)


def test_identity_and_flips_are_exact():
    identity = views.warp(IMAGE, jnp.eye(2), jnp.zeros(2))
    np.testing.assert_array_equal(identity, IMAGE)
    for axis, scale in ((0, (-1.0, 1.0)), (1, (1.0, -1.0))):
        flipped = views.warp(IMAGE, jnp.diag(jnp.array(scale)), jnp.zeros(2))
        np.testing.assert_array_equal(flipped, jnp.flip(IMAGE, axis))


@pytest.mark.parametrize("seed", range(5))
def test_warp_matches_scipy(seed):
    rng = np.random.default_rng(seed)
    matrix = np.eye(2) + rng.uniform(-0.3, 0.3, (2, 2))
    shift = rng.uniform(-0.2, 0.2, 2)
    size = np.array(IMAGE.shape[:2])
    offset = shift * size + (size - 1) / 2 - matrix @ ((size - 1) / 2)
    found = views.warp(IMAGE, jnp.asarray(matrix, jnp.float32), jnp.asarray(shift, jnp.float32))
    for channel in range(3):
        # "grid-constant" interpolates with the black outside, as the padded image does.
        expected = ndimage.affine_transform(
            np.asarray(IMAGE[..., channel]), matrix, offset, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(found[..., channel], expected, atol=1e-5)


def test_samples_far_outside_are_black():
    shifted = views.warp(IMAGE, jnp.eye(2), jnp.array([5.0, -7.0]))
    np.testing.assert_array_equal(shifted, jnp.zeros_like(IMAGE))


def test_random_geometry_has_its_ranges_and_probabilities():
    keys = jax.random.split(jax.random.key(0), 2000)
    geometry = views.Geometry()
    matrix, shift, flipped = jax.vmap(views.random_geometry, (0, None))(keys, geometry)
    determinant = np.abs(np.linalg.det(matrix))
    is_affine = determinant != 1.0
    assert is_affine.mean() == pytest.approx(0.7, abs=0.04)
    assert (np.abs(shift) <= 0.1).all()
    assert not np.any(np.asarray(shift)[~is_affine])
    scale = determinant[is_affine] ** -0.5
    assert scale.min() >= 0.8 - 1e-4
    assert scale.max() <= 1.2 + 1e-4
    rows = np.asarray(matrix)
    angle = np.degrees(np.arctan(rows[:, 1, 0] / rows[:, 1, 1]))
    assert np.abs(angle).max() <= 20.01
    assert (np.sign(rows[:, 0, 0]) < 0).mean() == pytest.approx(0.5, abs=0.04)
    np.testing.assert_array_equal(flipped, rows[:, 1, 1] < 0)
    assert flipped.mean() == pytest.approx(0.5, abs=0.04)


def test_all_maps_of_an_example_are_transformed_jointly():
    keys = jax.random.split(jax.random.key(3), 2)
    images = jnp.stack([IMAGE, 1 - IMAGE])
    masks = (images[..., :1] > 0.5).astype(jnp.float32)
    geometry = views.Geometry(horizontal_flip=1.0, vertical_flip=0.0, affine=0.0)
    (image, pseudo, mask), flipped = transform(keys, (images, 1 - images, masks), geometry)
    np.testing.assert_array_equal(image, images[:, :, ::-1])
    np.testing.assert_array_equal(pseudo, 1 - images[:, :, ::-1])
    np.testing.assert_array_equal(mask, masks[:, :, ::-1])
    assert flipped.tolist() == [True, True]


def test_transform_depends_on_the_key_and_returns_whether_it_flipped():
    keys = jax.random.split(jax.random.key(0), 16)
    geometry = views.Geometry(horizontal_flip=0.5, vertical_flip=0.0, affine=0.0)
    images = jnp.broadcast_to(IMAGE, (16, *IMAGE.shape))
    (found,), flipped = transform(keys, [images], geometry)
    expected = np.where(np.asarray(flipped)[:, None, None, None], images[:, :, ::-1], images)
    np.testing.assert_array_equal(found, expected)
    assert 0 < flipped.sum() < 16
    (part,), _ = transform(keys[4:6], [images[4:6]], geometry)
    np.testing.assert_array_equal(part, found[4:6])


def test_transformed_images_are_in_range_and_match_their_masks():
    keys = jax.random.split(jax.random.key(0), 20)
    mask = jnp.broadcast_to((IMAGE[..., :1] > 0.5).astype(jnp.float32), (20, 16, 20, 1))
    (images, masks), _ = views.transform(keys, (jnp.repeat(mask, 3, -1), mask), views.Geometry())
    np.testing.assert_array_equal(images, np.repeat(masks, 3, -1))
    assert 0 <= images.min() < images.max() <= 1


def test_photometric_changes_depend_on_the_key_and_are_in_range():
    strong = views.Strong()
    first, repeated, other = (
        views.strong_photometric(jax.random.key(seed), IMAGE, strong) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, repeated)
    assert np.abs(first - IMAGE).max() > 1e-3
    assert np.abs(first - other).max() > 1e-3
    assert 0 <= first.min() < first.max() <= 1


def test_transform_is_differentiable():
    keys = jax.random.split(jax.random.key(0), 1)
    gradient = jax.grad(lambda x: transform(keys, [x], views.Geometry())[0][0].sum())(IMAGE[None])
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).sum() > 0


def test_motion_kernel_is_a_line_that_sums_to_one():
    for seed in range(10):
        kernel = np.asarray(views.motion_kernel(jax.random.key(seed)))
        assert kernel.shape == (5, 5)
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        assert kernel.min() >= 0
        assert kernel[0].sum() + kernel[4].sum() < 0.25


def test_convolve_matches_scipy_correlate():
    kernel = RNG.random((5, 5)).astype(np.float32)
    found = views.convolve(IMAGE, jnp.asarray(kernel))
    for channel in range(3):
        expected = ndimage.correlate(np.asarray(IMAGE[..., channel]), kernel, mode="nearest")
        np.testing.assert_allclose(found[..., channel], expected, atol=1e-4)


@pytest.mark.parametrize("degrees", [-20, -7, 0, 1, 13, 20])
@pytest.mark.parametrize("size", [(57, 57), (40, 63)])
def test_rotation_by_whole_degrees_matches_pillow(degrees, size):
    image = np.random.default_rng(0).integers(1, 256, (*size, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.NEAREST))
    row = jnp.asarray(views.rotation_table(20, *size)[degrees + 20])
    found = views.rotate_nearest(jnp.asarray(image, jnp.float32), row)
    np.testing.assert_array_equal(found, expected)


def test_random_rotation_draws_every_angle_with_its_probability():
    geometry = views.Geometry(0.0, 0.0, 0.5, 2.0, 0.0, 1.0, 1.0, integer_degrees=True)
    image = jnp.arange(1.0, 80 * 80 + 1).reshape(80, 80, 1)
    keys = jax.random.split(jax.random.key(0), 200)
    images = jnp.tile(image, (200, 1, 1, 1))
    (rotated,), flipped = transform(keys, [images], geometry)
    assert not flipped.any()
    table = jnp.asarray(views.rotation_table(2, 80, 80))
    angle_of = {
        np.asarray(views.rotate_nearest(image, row)).tobytes(): i - 2 for i, row in enumerate(table)
    }
    angles = [angle_of[np.asarray(found).tobytes()] for found in rotated]
    counts = {angle: angles.count(angle) for angle in range(-2, 3)}
    assert 90 < counts[0] < 150  # half of them, and a fifth of the other half
    assert all(8 < counts[angle] < 40 for angle in (-2, -1, 1, 2))


def test_rejects_integer_degrees_with_a_flip():
    fields = {**views.Geometry()._asdict(), "integer_degrees": True}
    with pytest.raises(ValueError, match=r"views\.integer_degrees only rotates the images"):
        views.make_geometry(fields)


def test_photometric_augmentation_changes_contrast_about_the_mean_and_brightness():
    keys = jax.random.split(jax.random.key(0), 64)
    images = jnp.tile(0.4 + 0.2 * IMAGE, (64, 1, 1, 1))  # far from the limits: no clipping
    means = images.mean((1, 2, 3))
    assert views.adjust_photometric(keys, images, views.Photometric()) is images
    brighter = views.adjust_photometric(keys, images, views.Photometric(brightness=0.2)) - images
    np.testing.assert_allclose(brighter.max((1, 2, 3)), brighter.min((1, 2, 3)), atol=1e-6)
    assert 0.15 < float(jnp.abs(brighter).max()) <= 0.2
    assert float(brighter.min()) < 0 < float(brighter.max())
    contrast = views.adjust_photometric(keys, images, views.Photometric(contrast=0.3))
    np.testing.assert_allclose(contrast.mean((1, 2, 3)), means, atol=1e-5)
    factor = contrast.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.7 <= float(factor.min()) < 0.8 and 1.2 < float(factor.max()) <= 1.3
    clipped = views.adjust_photometric(
        keys, jnp.tile(IMAGE, (64, 1, 1, 1)), views.Photometric(0.5, 0.9)
    )
    assert float(clipped.min()) == 0 and float(clipped.max()) == 1
    # Each image depends only on its own key.
    np.testing.assert_allclose(
        views.adjust_photometric(keys[3:4], images[3:4], views.Photometric(0.2, 0.3))[0],
        views.adjust_photometric(keys, images, views.Photometric(0.2, 0.3))[3],
        atol=1e-6,
    )
