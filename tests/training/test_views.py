"""Views: geometry against SciPy, exact flips, one geometry for all, light within its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from biclip_jax.training import views

RNG = np.random.default_rng(0)
IMAGE = jnp.asarray(RNG.random((16, 20, 3)), jnp.float32)
# Compiled: one program takes less time than dozens of small ones.
move = jax.jit(views.transform, static_argnums=2)


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
    matrix, shift, flipped = jax.vmap(views.random_geometry, (0, None))(keys, geometry)
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
    np.testing.assert_array_equal(flipped, rows[:, 1, 1] < 0)
    assert flipped.mean() == pytest.approx(0.5, abs=0.04)


def test_one_geometry_moves_all_maps_of_an_example():
    keys = jax.random.split(jax.random.key(3), 2)
    images = jnp.stack([IMAGE, 1 - IMAGE])
    masks = (images[..., :1] > 0.5).astype(jnp.float32)
    geometry = views.Geometry(horizontal_flip=1.0, vertical_flip=0.0, affine=0.0)
    (moved, pseudo, mask), flipped = move(keys, (images, 1 - images, masks), geometry)
    np.testing.assert_array_equal(moved, images[:, :, ::-1])
    np.testing.assert_array_equal(pseudo, 1 - images[:, :, ::-1])
    np.testing.assert_array_equal(mask, masks[:, :, ::-1])
    assert flipped.tolist() == [True, True]


def test_each_example_moves_by_its_own_key_and_says_whether_it_was_flipped():
    keys = jax.random.split(jax.random.key(0), 16)
    geometry = views.Geometry(horizontal_flip=0.5, vertical_flip=0.0, affine=0.0)
    images = jnp.broadcast_to(IMAGE, (16, *IMAGE.shape))
    (moved,), flipped = move(keys, [images], geometry)
    expected = np.where(np.asarray(flipped)[:, None, None, None], images[:, :, ::-1], images)
    np.testing.assert_array_equal(moved, expected)
    assert 0 < flipped.sum() < 16
    (again,), _ = move(keys[4:6], [images[4:6]], geometry)
    np.testing.assert_array_equal(again, moved[4:6])


def test_moved_pictures_stay_in_range_and_mask_and_picture_move_alike():
    keys = jax.random.split(jax.random.key(0), 20)
    mask = jnp.broadcast_to((IMAGE[..., :1] > 0.5).astype(jnp.float32), (20, 16, 20, 1))
    (moved, other), _ = views.transform(keys, (jnp.repeat(mask, 3, -1), mask), views.Geometry())
    np.testing.assert_array_equal(moved, np.repeat(other, 3, -1))
    assert 0 <= moved.min() < moved.max() <= 1


def test_light_changes_by_key_and_stays_in_range():
    strong = views.Strong()
    first, again, other = (
        views.strong_photometric(jax.random.key(seed), IMAGE, strong) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - IMAGE).max() > 1e-3
    assert np.abs(first - other).max() > 1e-3
    assert 0 <= first.min() < first.max() <= 1


def test_gradient_reaches_the_pseudo_image_through_the_geometry():
    keys = jax.random.split(jax.random.key(0), 1)
    gradient = jax.grad(lambda x: move(keys, [x], views.Geometry())[0][0].sum())(IMAGE[None])
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


@pytest.mark.parametrize("degrees", [-20, -7, 0, 1, 13, 20])
@pytest.mark.parametrize("size", [(57, 57), (40, 63)])
def test_turns_by_whole_degrees_are_pillow_s(degrees, size):
    picture = np.random.default_rng(0).integers(1, 256, (*size, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(picture).rotate(degrees, Image.Resampling.NEAREST))
    row = jnp.asarray(views.rotation_table(20, *size)[degrees + 20])
    turned = views.rotate_nearest(jnp.asarray(picture, jnp.float32), row)
    np.testing.assert_array_equal(turned, expected)


def test_turning_at_random_takes_every_angle_and_leaves_the_rest_alone():
    geometry = views.Geometry(0.0, 0.0, 0.5, 2.0, 0.0, 1.0, 1.0, integer_degrees=True)
    picture = jnp.arange(1.0, 80 * 80 + 1).reshape(80, 80, 1)
    keys = jax.random.split(jax.random.key(0), 200)
    images = jnp.tile(picture, (200, 1, 1, 1))
    (turned,), flipped = move(keys, [images], geometry)
    assert not flipped.any()
    table = jnp.asarray(views.rotation_table(2, 80, 80))
    known = {
        np.asarray(views.rotate_nearest(picture, row)).tobytes(): i - 2
        for i, row in enumerate(table)
    }
    seen = [known[np.asarray(one).tobytes()] for one in turned]
    counts = {angle: seen.count(angle) for angle in range(-2, 3)}
    assert 90 < counts[0] < 150  # half of them, and a fifth of the other half
    assert all(8 < counts[angle] < 40 for angle in (-2, -1, 1, 2))


def test_whole_degrees_with_a_flip_are_refused():
    fields = {**views.Geometry()._asdict(), "integer_degrees": True}
    with pytest.raises(ValueError, match="turns pictures and does nothing else"):
        views.make_geometry(fields)


def test_the_light_of_both_views_changes_contrast_about_the_mean_and_brightness():
    keys = jax.random.split(jax.random.key(0), 64)
    images = jnp.tile(0.4 + 0.2 * IMAGE, (64, 1, 1, 1))  # far from the ends, where nothing is cut
    means = images.mean((1, 2, 3))
    assert views.adjust_photometric(keys, images, views.Photometric()) is images
    brighter = views.adjust_photometric(keys, images, views.Photometric(brightness=0.2)) - images
    np.testing.assert_allclose(brighter.max((1, 2, 3)), brighter.min((1, 2, 3)), atol=1e-6)
    assert 0.15 < float(jnp.abs(brighter).max()) <= 0.2
    assert float(brighter.min()) < 0 < float(brighter.max())
    other = views.adjust_photometric(keys, images, views.Photometric(contrast=0.3))
    np.testing.assert_allclose(other.mean((1, 2, 3)), means, atol=1e-5)
    factor = other.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.7 <= float(factor.min()) < 0.8 and 1.2 < float(factor.max()) <= 1.3
    both = views.adjust_photometric(
        keys, jnp.tile(IMAGE, (64, 1, 1, 1)), views.Photometric(0.5, 0.9)
    )
    assert float(both.min()) == 0 and float(both.max()) == 1
    # Each picture by its own key.
    np.testing.assert_allclose(
        views.adjust_photometric(keys[3:4], images[3:4], views.Photometric(0.2, 0.3))[0],
        views.adjust_photometric(keys, images, views.Photometric(0.2, 0.3))[3],
        atol=1e-6,
    )
