"""BiCLIP: shapes, published parameter counts, prompts, valid sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.models import biclip, fusion
from biclip_jax.training.state import num_parameters
from tests import tiny

# Parameter counts of the published network, from the specification of its checkpoint.
PUBLISHED = {
    "unet": 31_039_361,
    "image_encoder": 149_504,
    "refiner": 1_433_152,
    "text_projection": 1_219_904,
    "generator": 2_715,
    "cycle_head": 70_352,
    "consistency_head": 17_152,
}


@pytest.fixture(scope="module")
def initialised():
    model = tiny.model()
    return model, tiny.init(model)


def inputs(size=2):
    batch = tiny.batch(size)
    return biclip.to_unit_rgb(jnp.asarray(batch["image"])), biclip.text_inputs(batch)


def test_published_parameter_counts():
    features = jnp.zeros((1, 768))
    shapes = jax.eval_shape(
        lambda: biclip.BiCLIP().init(
            jax.random.key(0), jnp.zeros((1, 224, 224, 3)), text_features=features
        )
    )
    assert {k: num_parameters(v) for k, v in shapes["params"].items()} == PUBLISHED


def test_inference_returns_logits_and_named_intermediates(initialised):
    model, variables = initialised
    image, prompt = inputs()
    logits, aux = model.apply(variables, image, **prompt)
    assert logits.shape == (2, 56, 56, 1)
    shapes = {name: value.shape for name, value in aux.items()}
    assert shapes == {
        "text": (2, 784),
        "refined_text": (2, 784),
        "pseudo_image": (2, 56, 56, 3),
        "features": (2, 56, 56, 2),
    }
    assert 0 < float(aux["pseudo_image"].min()) < float(aux["pseudo_image"].max()) < 1


def test_call_is_fuse_and_segment(initialised):
    model, variables = initialised
    image, prompt = inputs()
    logits, _ = model.apply(variables, image, **prompt)
    fused = model.apply(variables, image, **prompt, method=model.fuse)
    view = biclip.View(image, fused.pseudo_image, fused.refined_text)
    segmented, _ = model.apply(variables, view, method=model.segment)
    np.testing.assert_array_equal(logits, segmented)
    assert fused.cycle_text is None


def test_mask_depends_on_prompt_and_refined_text_on_image(initialised):
    model, variables = initialised
    image, prompt = inputs()
    logits, aux = model.apply(variables, image, **prompt)
    other = {**prompt, "text_ids": prompt["text_ids"][::-1]}
    assert np.abs(model.apply(variables, image, **other)[0] - logits).max() > 1e-6
    _, darker = model.apply(variables, image * 0.5, **prompt)
    np.testing.assert_array_equal(darker["text"], aux["text"])
    assert np.abs(darker["refined_text"] - aux["refined_text"]).max() > 1e-6


def test_padding_does_not_change_the_logits(initialised):
    model, variables = initialised
    image, prompt = inputs()
    other_padding = jnp.where(prompt["text_mask"], prompt["text_ids"], 9)
    logits, _ = model.apply(variables, image, **prompt)
    other_logits, _ = model.apply(variables, image, other_padding, prompt["text_mask"])
    np.testing.assert_allclose(logits, other_logits, atol=1e-6)


def test_empty_prompt_gives_finite_logits(initialised):
    model, variables = initialised
    image, prompt = inputs()
    only_cls = jnp.arange(tiny.MAX_LENGTH)[None] < jnp.ones((2, 1))
    logits, _ = model.apply(variables, image, prompt["text_ids"], only_cls)
    assert np.isfinite(logits).all()


def test_accepts_text_features_instead_of_ids():
    model = biclip.BiCLIP(56, (2, 4, 8), encoder_widths=(2, 8), cycle_widths=(1, 2))
    image, features = jnp.zeros((1, 56, 56, 3)), jnp.ones((1, 24))
    variables = jax.jit(model.init)(jax.random.key(0), image, text_features=features)
    logits, _ = jax.jit(model.apply)(variables, image, text_features=features)
    assert logits.shape == (1, 56, 56, 1)


def test_training_pass_is_segment_with_consistency_heads(initialised):
    model, variables = initialised
    image, prompt = inputs()
    pseudo = model.apply(variables, image, **prompt, method=model.fuse).pseudo_image
    view = biclip.View(image, pseudo)
    found, updates = model.apply(
        variables, view, method=model.training_pass, mutable=["batch_stats"]
    )
    (logits, features), expected_updates = model.apply(
        variables, view, train=True, method=model.segment, mutable=["batch_stats"]
    )
    np.testing.assert_array_equal(found.logits, logits)
    jax.tree.map(np.testing.assert_array_equal, updates, expected_updates)
    head = variables["params"]["consistency_head"]
    pooled = np.asarray(features["decoder_0"]).mean((1, 2))
    x = pooled @ head["out"]["kernel"] + head["out"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    expected = x * head["norm"]["scale"] + head["norm"]["bias"]
    np.testing.assert_allclose(found.embeddings["decoder_0"], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "hidden"), [(56, ()), (112, (8,)), (224, (16, 8)), (448, (32, 16, 8))]
)
def test_generator_widths(size, hidden):
    assert fusion.generator_widths(size) == hidden


@pytest.mark.parametrize(
    ("size", "levels", "message"), [(200, 5, "224"), (28, 3, "56"), (56, 5, r"one of \[112, 224")]
)
def test_rejects_invalid_sizes_and_lists_valid_ones(size, levels, message):
    with pytest.raises(ValueError, match=message):
        tiny.model(image_size=size, num_levels=levels)
