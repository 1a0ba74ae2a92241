"""The strong view: CutMix boxes, elastic deformation against SciPy, ranges and disabled parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from biclip_jax.training import views

RNG = np.random.default_rng(0)
HEIGHT, WIDTH, NUM = 16, 20, 4
IMAGES = jnp.asarray(RNG.random((NUM, HEIGHT, WIDTH, 3)), jnp.float32)
MASKS = (IMAGES[..., :1] > 0.5).astype(jnp.float32)
KEYS = jax.random.split(jax.random.key(0), NUM)
OFF = views.Strong(photometric=False)
PARTNER = [1, 0, 3, 2]


def deformation(keys=KEYS, height=HEIGHT, width=WIDTH, **strong):
    return views.random_deformation(keys, height, width, OFF._replace(**strong))


@pytest.fixture(scope="module")
def boxes():
    """Returns 500 boxes in 64 x 64 images, sampled_deformation with probability 1."""
    keys = jax.random.split(jax.random.key(0), 500)
    return np.asarray(jax.vmap(lambda key: views.random_box(key, 64, 64, 1.0))(keys))[..., 0]


def test_boxes_are_rectangles_with_the_documented_area_and_shape(boxes):
    rows, columns = boxes.any(2), boxes.any(1)
    np.testing.assert_array_equal(boxes, rows[:, :, None] & columns[:, None, :])
    for extent in (rows, columns):  # contiguous
        assert (np.abs(np.diff(extent.astype(int), axis=1)).sum(1) <= 2).all()
    sides = rows.sum(1), columns.sum(1)
    area = sides[0] * sides[1] / 64**2
    low, high = views.CUTMIX_AREA
    # The error of a side is up to one pixel of its 64 * sqrt(area).
    assert area.min() > low * 0.9
    assert area.max() < high * 1.1
    assert area.mean() == pytest.approx((low + high) / 2, abs=0.02)
    shape = sides[0] / sides[1]
    assert 0.45 < shape.min() < 0.6 < 1.7 < shape.max() < 2.2


def test_boxes_are_anywhere_and_drawn_with_their_probability(boxes):
    centres = [np.argwhere(box).mean(0) for box in boxes]
    np.testing.assert_allclose(np.mean(centres, 0), [31.5, 31.5], atol=2)
    assert boxes[:, 0].any() and boxes[:, -1].any() and boxes[:, :, 0].any()
    keys = jax.random.split(jax.random.key(1), 500)
    small_boxes = jax.vmap(lambda key: views.random_box(key, 16, 16, 0.3))(keys)
    assert small_boxes.any((1, 2, 3)).mean() == pytest.approx(0.3, abs=0.06)


def test_pair_exchanges_the_same_box():
    sampled_deformation = deformation(cutmix=1.0)
    assert sampled_deformation.source is None
    box = np.asarray(sampled_deformation.box)
    assert box.any((1, 2, 3)).all()
    np.testing.assert_array_equal(box, box[PARTNER])
    assert (box[0] != box[2]).any()
    image, mask = views.deform([IMAGES, MASKS], sampled_deformation)
    np.testing.assert_array_equal(image, np.where(box, IMAGES[np.array(PARTNER)], IMAGES))
    np.testing.assert_array_equal(mask, np.where(box, MASKS[np.array(PARTNER)], MASKS))
    np.testing.assert_array_equal(
        views.deform([image], sampled_deformation)[0], IMAGES
    )  # an involution


def test_vectors_are_mixed_by_the_area_of_the_box():
    sampled_deformation = deformation(cutmix=1.0)
    vectors = RNG.standard_normal((NUM, 5)).astype(np.float32)
    found = views.mix_vectors(jnp.asarray(vectors), sampled_deformation)
    for row, other in enumerate(PARTNER):
        area = np.asarray(sampled_deformation.box[row]).sum() / (HEIGHT * WIDTH)
        expected = (1 - area) * vectors[row] + area * vectors[other]
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)
    unmixed = views.mix_vectors(jnp.asarray(vectors), deformation(elastic=0.1))
    np.testing.assert_array_equal(unmixed, jnp.asarray(vectors))


def test_swap_pairs_works_for_any_shape():
    for shape in [(NUM,), (NUM, 3), (NUM, 2, 3, 1)]:
        x = RNG.standard_normal(shape)
        np.testing.assert_allclose(views.swap_pairs(jnp.asarray(x)), x[PARTNER], rtol=1e-6)


def test_elastic_deformation_matches_scipy():
    sampled_deformation = deformation(elastic=0.05)
    assert sampled_deformation.box is None
    image, mask = views.deform([IMAGES, MASKS], sampled_deformation)
    for row in range(NUM):
        source = np.asarray(sampled_deformation.source[row]).transpose(2, 0, 1)
        for found, maps in ((image, IMAGES), (mask, MASKS)):
            for channel in range(maps.shape[-1]):
                expected = ndimage.map_coordinates(
                    np.asarray(maps[row, ..., channel]), source, order=1, mode="grid-constant"
                )
                np.testing.assert_allclose(found[row, ..., channel], expected, atol=1e-4)


def test_elastic_field_is_smooth_and_has_the_configured_scale():
    keys = jax.random.split(jax.random.key(0), 200)
    source = jax.vmap(lambda key: views.elastic_source(key, 56, 112, 0.01))(keys)
    grid = np.stack(np.meshgrid(np.arange(56), np.arange(112), indexing="ij"), -1)
    shift = np.asarray(source) - grid
    # The field equals the displacements at the control points and is smaller between them.
    for axis, side in enumerate((56, 112)):
        assert 0.6 < shift[..., axis].std() / (0.01 * side) < 1.05
        # Smooth: rows and columns keep their order, so the field does not fold.
        assert np.diff(np.asarray(source)[..., axis], axis=1 + axis).min() > 0
    assert np.abs(shift.mean((0, 1, 2))).max() < 0.1
    assert abs(np.corrcoef(shift[:, 28, 56, 0], shift[:, 28, 56, 1])[0, 1]) < 0.25


def test_image_and_mask_are_deformed_identically():
    sampled_deformation = deformation(elastic=0.05, cutmix=1.0)
    image, mask = views.deform([jnp.repeat(MASKS, 3, -1), MASKS], sampled_deformation)
    np.testing.assert_array_equal(image, np.repeat(mask, 3, -1))
    (elastic,) = views.deform([MASKS], sampled_deformation._replace(box=None))
    np.testing.assert_array_equal(
        mask, np.where(sampled_deformation.box, elastic[np.array(PARTNER)], elastic)
    )


def test_disabled_deformation_is_the_identity():
    sampled_deformation = deformation()
    assert sampled_deformation == views.Deformation(None, None)
    for found, maps in zip(
        views.deform([IMAGES, MASKS], sampled_deformation), (IMAGES, MASKS), strict=True
    ):
        np.testing.assert_array_equal(found, maps)
    np.testing.assert_array_equal(views.strong_photometric(KEYS[0], IMAGES[0], OFF), IMAGES[0])


def test_rows_depend_only_on_their_own_keys():
    """A device with the rows 2 and 3 draws the same as one with all rows."""
    full, part = (deformation(keys, elastic=0.05, cutmix=1.0) for keys in (KEYS, KEYS[2:]))
    np.testing.assert_array_equal(full.source[2:], part.source)
    np.testing.assert_array_equal(full.box[2:], part.box)


@pytest.mark.parametrize(
    "strong",
    [
        pytest.param({"photometric": True}, marks=pytest.mark.slow),
        *({"noise": 0.5}, {"brightness": 0.9}, {"contrast": 0.9}),
    ],
    ids=lambda strong: next(iter(strong)),
)
def test_strong_photometric_changes_are_in_range_and_depend_on_the_key(strong):
    change = jax.vmap(lambda key: views.strong_photometric(key, IMAGES[0], OFF._replace(**strong)))
    found = np.asarray(change(jax.random.split(jax.random.key(0), 16)))
    assert found.min() >= 0
    assert found.max() <= 1
    assert np.abs(found - IMAGES[0]).max((1, 2, 3)).min() > 0
    assert np.abs(found[0] - found[1]).max() > 1e-4


def test_each_photometric_change_matches_its_definition():
    grey = jnp.asarray(RNG.uniform(0.4, 0.6, (64, 64, 1)), jnp.float32).repeat(3, -1)
    keys = jax.random.split(jax.random.key(0), 200)

    def augment(**strong):
        config = OFF._replace(**strong)
        return np.asarray(jax.vmap(lambda k: views.strong_photometric(k, grey, config))(keys))

    mean = float(grey.mean())
    bright = augment(brightness=0.2) - np.asarray(grey)
    assert bright.std((1, 2, 3)).max() < 1e-5
    assert 0.18 < np.abs(bright).max() <= 0.2 + 1e-5
    contrast = (augment(contrast=0.3) - mean) / (np.asarray(grey) - mean)
    factor = np.median(contrast, axis=(1, 2, 3))
    assert 0.7 <= factor.min() < 0.75 < 1.25 < factor.max() <= 1.3
    noise = augment(noise=0.1) - np.asarray(grey)
    np.testing.assert_allclose(noise[..., 0], noise[..., 2], atol=1e-6)  # shared by the channels
    deviation = noise[..., 0].std((1, 2))
    assert deviation.min() < 0.01 < 0.09 < deviation.max() < 0.105
    assert deviation.mean() == pytest.approx(0.05, abs=0.01)
