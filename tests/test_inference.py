"""Loading trained models and segmenting images."""

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

PROMPT = "unilateral pulmonary infection, one infected area, lower left lung."


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (70, 90, 1)).astype(np.uint8)


def test_a_work_directory_and_its_model_folder_load_the_same_model(trained):
    by_run = biclip_jax.load_model(trained)
    by_folder = biclip_jax.load_model(trained / "model")
    assert by_run[0] == by_folder[0]
    np.testing.assert_array_equal(
        by_run[1]["params"]["unet"]["head"]["kernel"],
        by_folder[1]["params"]["unet"]["head"]["kernel"],
    )


def test_the_model_accepts_the_output_of_the_processor(trained, image):
    model, variables, processor = biclip_jax.load_model(trained)
    inputs = processor([image, image], [PROMPT, ""])
    pixels = jnp.asarray(inputs["image"], jnp.float32) / 255
    ids, mask = jnp.asarray(inputs["text_ids"]), jnp.asarray(inputs["text_mask"])
    logits, aux = model.apply(variables, pixels, ids, mask)
    assert logits.shape == (2, 56, 56, 1)
    assert set(aux) == {"text", "refined_text", "pseudo_image", "features"}
    assert inputs["text_mask"].sum(1).tolist()[1] == 1


def test_the_processor_uses_its_resize_method(image):
    default = inference.Processor(None, 56, 8).resize([image])
    opencv = inference.Processor(None, 56, 8, resize_method="opencv").resize([image])
    assert default.shape == opencv.shape == (1, 56, 56, 3)
    np.testing.assert_array_equal(default[0, ..., :1], image_io.resize_image(image, 56))
    np.testing.assert_array_equal(opencv[0, ..., 2:], image_io.resize_image(image, 56, "opencv"))


def test_a_prediction_has_the_size_of_the_image_and_is_consistent(trained, image):
    mask, probability, uncertainty = biclip_jax.load(trained).predict(image, PROMPT)
    assert mask.shape == probability.shape == uncertainty.shape == (70, 90)
    np.testing.assert_array_equal(mask, probability >= 0.5)
    expected = -probability * np.log(probability) - (1 - probability) * np.log(1 - probability)
    np.testing.assert_allclose(uncertainty, expected, atol=1e-5)
    assert uncertainty.max() <= np.log(2) + 1e-6


def test_predict_samples_rejects_a_model_that_does_not_sample(trained, image):
    segmenter = biclip_jax.load(trained)
    assert not segmenter.samples
    with pytest.raises(ValueError, match="does not sample; use predict"):
        segmenter.predict_samples(image, PROMPT)


def test_predict_views_is_the_mean_of_the_inverted_views(trained, image):
    segmenter = biclip_jax.load(trained)
    result = segmenter.predict_views(image, PROMPT)
    square = segmenter.processor.resize([image])[0]
    # At the model's image size, where each view is a valid input of predict.
    (maps,) = tta.predict_views(
        lambda batch: segmenter.predict(
            np.rint(batch["image"][0]).astype(np.uint8), batch["prompt"]
        ).probability[None, ..., None],
        {
            "image": square[None],
            "prompt": PROMPT,
            "swapped_prompt": text.swap_sides(PROMPT),
        },
        list(tta.VIEWS.values()),
    )
    expected = [image_io.resize_probability(m, 70, 90) for m in np.moveaxis(maps, -1, 0)]
    np.testing.assert_allclose(result.probability, expected[0], atol=2e-3)
    np.testing.assert_allclose(result.uncertainty, expected[1], atol=2e-3)
    np.testing.assert_allclose(result.epistemic, expected[2], atol=2e-3)
    assert result.epistemic.max() > 0 and (result.epistemic <= result.uncertainty + 1e-6).all()
    np.testing.assert_array_equal(result.mask, result.probability >= 0.5)


@pytest.mark.parametrize(
    ("image", "prompt", "message"),
    [
        (Image.new("L", (9, 9)), PROMPT, "image: found Image; expected a uint8 array"),
        (np.zeros((9, 9)), PROMPT, r"float64 \(9, 9\); expected uint8 .*to 0..255"),
        (np.zeros((3, 9, 9), np.uint8), PROMPT, r"uint8 \(3, 9, 9\); .*channels last"),
        (np.zeros((9, 9), np.uint8), None, 'prompt: found None; expected a str, "" for none'),
    ],
)
def test_rejects_invalid_images_and_prompts(trained, image, prompt, message):
    segmenter = biclip_jax.load(trained)
    for predict in (segmenter.predict, segmenter.predict_views):
        with pytest.raises(ValueError, match=message):
            predict(image, prompt)


def test_files_and_arrays_gray_or_rgb_give_the_same_result(trained, image, tmp_path):
    segmenter = biclip_jax.load(trained)
    Image.fromarray(image[..., 0]).save(tmp_path / "p.png")
    expected = segmenter.predict(image, PROMPT).probability
    rgb = np.repeat(image, 3, axis=2)
    for source in (image[..., 0], rgb, tmp_path / "p.png", str(tmp_path / "p.png")):
        np.testing.assert_allclose(
            segmenter.predict(source, PROMPT).probability, expected, atol=1e-6
        )


def test_errors_name_an_unreadable_image(trained, tmp_path):
    segmenter = biclip_jax.load(trained)
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(BadImageError, match=r"bad\.png"):
        segmenter.predict(tmp_path / "bad.png")
    with pytest.raises(ValueError, match="float64"):
        segmenter.predict(np.zeros((4, 4)))


def test_rejects_parameters_of_another_model(trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "model")
    config, variables = inference.model_folder.read(tmp_path / "model")
    other_parts = {
        "tokenizer": (tmp_path / "model/tokenizer/tokenizer.json").read_text(),
        "card": "",
    }
    kernel = variables["params"]["unet"]["head"].pop("kernel")
    inference.model_folder.write(
        tmp_path / "model", config=config, variables=variables, **other_parts
    )
    with pytest.raises(UserError, match="unet/head/kernel"):
        biclip_jax.load(tmp_path)
    variables["params"]["unet"]["head"]["kernel"] = kernel[..., :0]
    inference.model_folder.write(
        tmp_path / "model", config=config, variables=variables, **other_parts
    )
    with pytest.raises(UserError, match="unet/head/kernel"):
        biclip_jax.load(tmp_path)


def test_rejects_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="workdir of a run"):
        biclip_jax.load(tmp_path)
