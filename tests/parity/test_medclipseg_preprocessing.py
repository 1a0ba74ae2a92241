"""Images, masks, rotations and metrics against those of the MedCLIPSeg authors.

tests/fixtures/medclipseg_preprocessing.npz: a random image (BGR) and mask, the network inputs that
the authors' code (arXiv 2602.20423) makes of them, rotated versions, and the scores of eight pairs
of masks.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from biclip_jax.data import image_io
from biclip_jax.data.builders import layout
from biclip_jax.data.schema import Example
from biclip_jax.evaluation.metrics import surface
from biclip_jax.training import views
from tests import tiny_medclipseg as tiny

AUTHORS = np.load(Path(__file__).parent.parent / "fixtures/medclipseg_preprocessing.npz")
SIZE = 224


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Writes the image and the mask as files."""
    folder = tmp_path_factory.mktemp("images")
    image, mask = folder / "image.png", folder / "mask.png"
    Image.fromarray(AUTHORS["raw_bgr"][..., ::-1]).save(image)
    Image.fromarray(AUTHORS["raw_mask"]).save(mask)
    return Example("0", "train", image, mask, "")


@pytest.fixture(scope="module")
def record(example):
    """Reads the example with `data.resize=opencv`."""
    return layout.read_record(example, SIZE, 3, "opencv")


def test_network_input_matches_the_authors(record):
    model = tiny.medclipseg.build(tiny.fields(input="imagenet_bgr"))
    (found,) = model.normalise(jnp.asarray(record["image"][None], jnp.float32) / 255)
    expected = AUTHORS["prep_image"].transpose(1, 2, 0)
    # To a hundredth of an intensity level: exact up to the rounding of the division.
    np.testing.assert_allclose(found, expected, atol=0.01 / 255 / 0.225)


def test_mask_matches_the_authors(record):
    np.testing.assert_array_equal(record["mask"][..., 0], AUTHORS["prep_mask"])


def test_default_threshold_excludes_127(example):
    assert (AUTHORS["raw_mask"] == 127).any()
    for method, threshold in (("opencv", 127), ("antialiased", 128)):
        found = image_io.read_mask(example.mask_path, method)[..., 0]
        np.testing.assert_array_equal(found, AUTHORS["raw_mask"] >= threshold)


def test_rotated_images_and_masks_match_the_authors(record):
    table = views.rotation_table(20, SIZE, SIZE)
    rotated = zip(AUTHORS["rot_angles"], AUTHORS["rot_images"], AUTHORS["rot_masks"], strict=True)
    for angle, image, mask in rotated:
        row = jnp.asarray(table[angle + 20])
        # The authors' images are BGR; the rotation is the same for every channel.
        found = views.rotate_nearest(jnp.asarray(record["image"][..., ::-1], jnp.float32), row)
        np.testing.assert_array_equal(found, image)
        found = views.rotate_nearest(jnp.asarray(record["mask"], jnp.float32), row)
        np.testing.assert_array_equal(found[..., 0], mask)


@pytest.mark.parametrize(("measure", "name"), [("dsc", "dsc"), ("nsd_plate", "nsd_repo")])
def test_dsc_and_plate_surface_dice_match_the_authors(measure, name):
    pairs = zip(AUTHORS["metric_pred"], AUTHORS["metric_gt"], strict=True)
    found = [surface.MEASURES[measure](prediction > 0, mask > 0) for prediction, mask in pairs]
    np.testing.assert_allclose(found, AUTHORS[f"metric_{name}"], atol=1e-6)


def test_2d_surface_dice_matches_the_authors():
    for prediction, mask, expected in zip(
        AUTHORS["metric_pred"], AUTHORS["metric_gt"], AUTHORS["metric_nsd_true2d"], strict=True
    ):
        found = surface.surface_dice(prediction > 0, mask > 0)
        # Two empty masks give 1, as in DSC and the authors' NSD, instead of being undefined.
        assert found == pytest.approx(1.0 if np.isnan(expected) else expected, abs=1e-6)
