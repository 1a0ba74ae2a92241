"""Views: geometry against SciPy, exact flips, one geometry for all, light within its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from biclip_jax.training import views

RNG = np.random.default_rng(0)
IMAGE = jnp.asarray(RNG.random((16, 20, 3)), jnp.float32)
NO_GEOMETRY = views.Geometry(horizontal_flip=0.0, vertical_flip=0.0, affine=0.0)


def test_identity_and_flips_are_exact():
    still = views.warp(IMAGE, jnp.eye(2), jnp.zeros(2))
    np.testing.assert_array_equal(still, IMAGE)
    for axis, scale in ((0, (-1.0, 1.0)), (1, (1.0, -1.0))):
        flipped = views.warp(IMAGE, jnp.diag(jnp.array(scale)), jnp.zeros(2))
        np.testing.assert_array_equal(flipped, jnp.flip(IMAGE, axis))


@pytest.mark.parametrize("seed", range(5))
def test_warp_is_scipy_s_bilinear_affine_transform(seed):
    rng = np.random.default_rng(seed)
    matrix = np.eye(2) + rng.uniform(-0.3, 0.3, (2, 2))
    shift = rng.uniform(-0.2, 0.2, 2)
    size = np.array(IMAGE.shape[:2])
    offset = shift * size + (size - 1) / 2 - matrix @ ((size - 1) / 2)
    ours = views.warp(IMAGE, jnp.asarray(matrix, jnp.float32), jnp.asarray(shift, jnp.float32))
    for channel in range(3):
        # "grid-constant" blends with the black outside, as the padded picture does.
        expected = ndimage.affine_transform(
            np.asarray(IMAGE[..., channel]), matrix, offset, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(ours[..., channel], expected, atol=1e-5)


def test_far_outside_is_black():
    gone = views.warp(IMAGE, jnp.eye(2), jnp.array([5.0, -7.0]))
    np.testing.assert_array_equal(gone, jnp.zeros_like(IMAGE))


def test_random_geometry_keeps_its_ranges_and_probabilities():
    keys = jax.random.split(jax.random.key(0), 2000)
    geometry = views.Geometry()
    matrix, shift = jax.vmap(views.random_geometry, (0, None))(keys, geometry)
    determinant = np.abs(np.linalg.det(matrix))
    moved = determinant != 1.0
    assert moved.mean() == pytest.approx(0.7, abs=0.04)
    assert (np.abs(shift) <= 0.1).all()
    assert not np.any(np.asarray(shift)[~moved])
    scale = determinant[moved] ** -0.5
    assert scale.min() >= 0.8 - 1e-4
    assert scale.max() <= 1.2 + 1e-4
    rows = np.asarray(matrix)
    angle = np.degrees(np.arctan(rows[:, 1, 0] / rows[:, 1, 1]))
    assert np.abs(angle).max() <= 20.01
    assert (np.sign(rows[:, 0, 0]) < 0).mean() == pytest.approx(0.5, abs=0.04)
    assert (np.sign(rows[:, 1, 1]) < 0).mean() == pytest.approx(0.5, abs=0.04)


def test_one_geometry_moves_picture_pseudo_image_and_mask():
    mask = (IMAGE[..., :1] > 0.5).astype(jnp.float32)
    geometry = views.Geometry(horizontal_flip=1.0, vertical_flip=0.0, affine=0.0)
    view = views.weak_and_strong(jax.random.key(3), IMAGE, 1 - IMAGE, mask, geometry)
    np.testing.assert_array_equal(view.weak_image, IMAGE[:, ::-1])
    np.testing.assert_array_equal(view.pseudo_image, 1 - IMAGE[:, ::-1])
    np.testing.assert_array_equal(view.mask, mask[:, ::-1])


def test_masks_stay_binary_and_pictures_in_range():
    mask = (IMAGE[..., :1] > 0.5).astype(jnp.float32)
    for seed in range(20):
        view = views.weak_and_strong(jax.random.key(seed), IMAGE, IMAGE, mask, views.Geometry())
        assert set(np.unique(view.mask)) <= {0.0, 1.0}
        for picture in (view.weak_image, view.strong_image, view.pseudo_image):
            assert picture.min() >= 0
            assert picture.max() <= 1


def test_light_changes_the_strong_picture_alone_and_by_key():
    mask = jnp.zeros((16, 20, 1))
    first = views.weak_and_strong(jax.random.key(0), IMAGE, IMAGE, mask, NO_GEOMETRY)
    again = views.weak_and_strong(jax.random.key(0), IMAGE, IMAGE, mask, NO_GEOMETRY)
    other = views.weak_and_strong(jax.random.key(1), IMAGE, IMAGE, mask, NO_GEOMETRY)
    np.testing.assert_array_equal(first.weak_image, IMAGE)
    np.testing.assert_array_equal(first.pseudo_image, IMAGE)
    np.testing.assert_array_equal(first.strong_image, again.strong_image)
    assert np.abs(first.strong_image - IMAGE).max() > 1e-3
    assert np.abs(first.strong_image - other.strong_image).max() > 1e-3


def test_gradient_reaches_the_pseudo_image_through_the_geometry():
    mask = jnp.zeros((16, 20, 1))

    def total(pseudo):
        return views.weak_and_strong(
            jax.random.key(0), IMAGE, pseudo, mask, views.Geometry()
        ).pseudo_image.sum()

    gradient = jax.grad(total)(IMAGE)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).sum() > 0


def test_motion_kernel_is_a_line_of_weight_one():
    for seed in range(10):
        kernel = np.asarray(views.motion_kernel(jax.random.key(seed)))
        assert kernel.shape == (5, 5)
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        assert kernel.min() >= 0
        assert kernel[0].sum() + kernel[4].sum() < 0.25


def test_convolve_is_scipy_s_correlation_with_repeated_edges():
    kernel = RNG.random((5, 5)).astype(np.float32)
    ours = views.convolve(IMAGE, jnp.asarray(kernel))
    for channel in range(3):
        expected = ndimage.correlate(np.asarray(IMAGE[..., channel]), kernel, mode="nearest")
        np.testing.assert_allclose(ours[..., channel], expected, atol=1e-4)
