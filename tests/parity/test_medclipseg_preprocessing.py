"""Pictures, masks, rotations and metrics against the MedCLIPSeg authors' own.

tests/fixtures/medclipseg_preprocessing.npz: a picture (BGR) and a mask of noise, what the authors' code
(arXiv 2602.20423) feeds its network for them, turned ones, and the scores of eight pairs of masks.
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

THEIRS = np.load(Path(__file__).parent.parent / "fixtures/medclipseg_preprocessing.npz")
SIZE = 224


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The picture and the mask as files."""
    folder = tmp_path_factory.mktemp("images")
    image, mask = folder / "image.png", folder / "mask.png"
    Image.fromarray(THEIRS["raw_bgr"][..., ::-1]).save(image)
    Image.fromarray(THEIRS["raw_mask"]).save(mask)
    return Example("0", "train", image, mask, "")


@pytest.fixture(scope="module")
def record(example):
    """As `data.resize=opencv` reads them."""
    return layout.read_record(example, SIZE, 3, "opencv")


def test_the_network_s_input_is_theirs(record):
    model = tiny.medclipseg.build(tiny.fields(input="imagenet_bgr"))
    (found,) = model.normalise(jnp.asarray(record["image"][None], jnp.float32) / 255)
    expected = THEIRS["prep_image"].transpose(1, 2, 0)
    # To a hundredth of a grey level: exact but for the division's rounding.
    np.testing.assert_allclose(found, expected, atol=0.01 / 255 / 0.225)


def test_the_mask_is_theirs(record):
    np.testing.assert_array_equal(record["mask"][..., 0], THEIRS["prep_mask"])


def test_by_default_127_is_background(example):
    assert (THEIRS["raw_mask"] == 127).any()
    for method, darkest in (("opencv", 127), ("antialiased", 128)):
        found = image_io.read_mask(example.mask_path, method)[..., 0]
        np.testing.assert_array_equal(found, THEIRS["raw_mask"] >= darkest)


def test_turned_pictures_and_masks_are_theirs(record):
    table = views.rotation_table(20, SIZE, SIZE)
    turned = zip(THEIRS["rot_angles"], THEIRS["rot_images"], THEIRS["rot_masks"], strict=True)
    for angle, image, mask in turned:
        row = jnp.asarray(table[angle + 20])
        # Their pictures are BGR; the turn is the same for every channel.
        found = views.rotate_nearest(jnp.asarray(record["image"][..., ::-1], jnp.float32), row)
        np.testing.assert_array_equal(found, image)
        found = views.rotate_nearest(jnp.asarray(record["mask"], jnp.float32), row)
        np.testing.assert_array_equal(found[..., 0], mask)


@pytest.mark.parametrize(("measure", "theirs"), [("dsc", "dsc"), ("nsd_plate", "nsd_repo")])
def test_dsc_and_the_plate_s_surface_dice(measure, theirs):
    pairs = zip(THEIRS["metric_pred"], THEIRS["metric_gt"], strict=True)
    found = [surface.MEASURES[measure](prediction > 0, mask > 0) for prediction, mask in pairs]
    np.testing.assert_allclose(found, THEIRS[f"metric_{theirs}"], atol=1e-6)


def test_surface_dice_in_two_dimensions():
    for prediction, mask, expected in zip(
        THEIRS["metric_pred"], THEIRS["metric_gt"], THEIRS["metric_nsd_true2d"], strict=True
    ):
        found = surface.surface_dice(prediction > 0, mask > 0)
        # Nothing predicted where nothing is: 1 here, as DSC and their own NSD say, not undefined.
        assert found == pytest.approx(1.0 if np.isnan(expected) else expected, abs=1e-6)
