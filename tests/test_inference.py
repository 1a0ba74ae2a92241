"""Loading a run and predicting with it."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import biclip_jax
from biclip_jax import inference
from biclip_jax.core.errors import BadImageError, UserError
from biclip_jax.data import image_io, text
from biclip_jax.evaluation.robustness import tta

SENTENCE = "unilateral pulmonary infection, one infected area, lower left lung."


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (70, 90, 1)).astype(np.uint8)


def test_a_work_directory_and_its_model_folder_are_one_model(trained):
    by_run = biclip_jax.load_model(trained)
    by_folder = biclip_jax.load_model(trained / "model")
    assert by_run[0] == by_folder[0]
    np.testing.assert_array_equal(
        by_run[1]["params"]["unet"]["head"]["kernel"],
        by_folder[1]["params"]["unet"]["head"]["kernel"],
    )


def test_the_model_applies_to_what_the_processor_gives(trained, picture):
    model, variables, processor = biclip_jax.load_model(trained)
    inputs = processor([picture, picture], [SENTENCE, ""])
    image = jnp.asarray(inputs["image"], jnp.float32) / 255
    ids, mask = jnp.asarray(inputs["text_ids"]), jnp.asarray(inputs["text_mask"])
    logits, aux = model.apply(variables, image, ids, mask)
    assert logits.shape == (2, 56, 56, 1)
    assert set(aux) == {"text", "refined_text", "pseudo_image", "features"}
    assert inputs["text_mask"].sum(1).tolist()[1] == 1


def test_the_processor_resizes_as_it_is_told(picture):
    plain = inference.Processor(None, 56, 8).resize([picture])
    told = inference.Processor(None, 56, 8, resize_method="opencv").resize([picture])
    assert plain.shape == told.shape == (1, 56, 56, 3)
    np.testing.assert_array_equal(plain[0, ..., :1], image_io.resize_image(picture, 56))
    np.testing.assert_array_equal(told[0, ..., 2:], image_io.resize_image(picture, 56, "opencv"))


def test_a_prediction_has_the_picture_s_size_and_agrees_with_itself(trained, picture):
    mask, probability, uncertainty = biclip_jax.load(trained).predict(picture, SENTENCE)
    assert mask.shape == probability.shape == uncertainty.shape == (70, 90)
    np.testing.assert_array_equal(mask, probability >= 0.5)
    expected = -probability * np.log(probability) - (1 - probability) * np.log(1 - probability)
    np.testing.assert_allclose(uncertainty, expected, atol=1e-5)
    assert uncertainty.max() <= np.log(2) + 1e-6


def test_a_model_that_draws_no_samples_says_so(trained, picture):
    segmenter = biclip_jax.load(trained)
    assert not segmenter.samples
    with pytest.raises(ValueError, match="draws no samples; use predict"):
        segmenter.predict_samples(picture, SENTENCE)


def test_the_mean_over_views_is_that_of_single_passes_brought_back(trained, picture):
    segmenter = biclip_jax.load(trained)
    found = segmenter.predict_views(picture, SENTENCE)
    square = segmenter.processor.resize([picture])[0]
    # At the model's own size, where a view of the picture is a picture that predict takes.
    (whole,) = tta.predict_views(
        lambda batch: segmenter.predict(
            np.rint(batch["image"][0]).astype(np.uint8), batch["sentence"]
        ).probability[None, ..., None],
        {
            "image": square[None],
            "sentence": SENTENCE,
            "mirrored_sentence": text.swap_sides(SENTENCE),
        },
        list(tta.VIEWS.values()),
    )
    expected = [image_io.resize_probability(one, 70, 90) for one in np.moveaxis(whole, -1, 0)]
    np.testing.assert_allclose(found.probability, expected[0], atol=2e-3)
    np.testing.assert_allclose(found.uncertainty, expected[1], atol=2e-3)
    np.testing.assert_allclose(found.epistemic, expected[2], atol=2e-3)
    assert found.epistemic.max() > 0 and (found.epistemic <= found.uncertainty + 1e-6).all()
    np.testing.assert_array_equal(found.mask, found.probability >= 0.5)


@pytest.mark.parametrize(
    ("image", "prompt", "message"),
    [
        (Image.new("L", (9, 9)), SENTENCE, "the picture is a Image; expected a uint8 array"),
        (np.zeros((9, 9)), SENTENCE, r"float64 \(9, 9\); expected uint8 .*to 0..255"),
        (np.zeros((3, 9, 9), np.uint8), SENTENCE, r"uint8 \(3, 9, 9\); .*channels last"),
        (np.zeros((9, 9), np.uint8), None, 'the sentence is None; expected a str, "" for none'),
    ],
)
def test_what_is_no_picture_or_no_sentence_is_said(trained, image, prompt, message):
    segmenter = biclip_jax.load(trained)
    for predict in (segmenter.predict, segmenter.predict_views):
        with pytest.raises(ValueError, match=message):
            predict(image, prompt)


def test_files_arrays_grey_and_rgb_give_the_same(trained, picture, tmp_path):
    segmenter = biclip_jax.load(trained)
    Image.fromarray(picture[..., 0]).save(tmp_path / "p.png")
    expected = segmenter.predict(picture, SENTENCE).probability
    rgb = np.repeat(picture, 3, axis=2)
    for same in (picture[..., 0], rgb, tmp_path / "p.png", str(tmp_path / "p.png")):
        np.testing.assert_allclose(
            segmenter.predict(same, SENTENCE).probability, expected, atol=1e-6
        )


def test_bad_pictures_are_named(trained, tmp_path):
    segmenter = biclip_jax.load(trained)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(BadImageError, match=r"bad\.png"):
        segmenter.predict(tmp_path / "bad.png")
    with pytest.raises(ValueError, match="float64"):
        segmenter.predict(np.zeros((4, 4)))


def test_parameters_of_another_model_are_refused_by_name(trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "model")
    config, variables = inference.model_folder.read(tmp_path / "model")
    rest = {"tokenizer": (tmp_path / "model/tokenizer/tokenizer.json").read_text(), "card": ""}
    kernel = variables["params"]["unet"]["head"].pop("kernel")
    inference.model_folder.write(tmp_path / "model", config=config, variables=variables, **rest)
    with pytest.raises(UserError, match="unet/head/kernel"):
        biclip_jax.load(tmp_path)
    variables["params"]["unet"]["head"]["kernel"] = kernel[..., :0]
    inference.model_folder.write(tmp_path / "model", config=config, variables=variables, **rest)
    with pytest.raises(UserError, match="unet/head/kernel"):
        biclip_jax.load(tmp_path)


def test_an_empty_folder_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="workdir of a run"):
        biclip_jax.load(tmp_path)
