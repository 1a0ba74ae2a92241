"""BiCLIP assembled: shapes, parameter counts of the paper, sentences, legal sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.models import biclip, fusion
from biclip_jax.training.state import num_parameters
from tests import tiny

# Parts of the published network, by the specification of its checkpoint.
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


def test_inference_gives_logits_and_named_intermediates(initialised):
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
    again, _ = model.apply(variables, view, method=model.segment)
    np.testing.assert_array_equal(logits, again)
    assert fused.cycle_text is None


def test_the_sentence_reaches_the_mask_and_the_picture_reaches_the_sentence(initialised):
    model, variables = initialised
    image, prompt = inputs()
    logits, aux = model.apply(variables, image, **prompt)
    other = {**prompt, "text_ids": prompt["text_ids"][::-1]}
    assert np.abs(model.apply(variables, image, **other)[0] - logits).max() > 1e-6
    _, seen = model.apply(variables, image * 0.5, **prompt)
    np.testing.assert_array_equal(seen["text"], aux["text"])
    assert np.abs(seen["refined_text"] - aux["refined_text"]).max() > 1e-6


def test_padding_does_not_change_the_sentence(initialised):
    model, variables = initialised
    image, prompt = inputs()
    scrambled = jnp.where(prompt["text_mask"], prompt["text_ids"], 9)
    logits, _ = model.apply(variables, image, **prompt)
    again, _ = model.apply(variables, image, scrambled, prompt["text_mask"])
    np.testing.assert_allclose(logits, again, atol=1e-6)


def test_an_empty_sentence_is_legal(initialised):
    model, variables = initialised
    image, prompt = inputs()
    only_cls = jnp.arange(tiny.MAX_LENGTH)[None] < jnp.ones((2, 1))
    logits, _ = model.apply(variables, image, prompt["text_ids"], only_cls)
    assert np.isfinite(logits).all()


def test_text_features_take_the_place_of_ids():
    model = biclip.BiCLIP(56, (2, 4, 8), encoder_widths=(2, 8), cycle_widths=(1, 2))
    image, features = jnp.zeros((1, 56, 56, 3)), jnp.ones((1, 24))
    variables = jax.jit(model.init)(jax.random.key(0), image, text_features=features)
    logits, _ = jax.jit(model.apply)(variables, image, text_features=features)
    assert logits.shape == (1, 56, 56, 1)


def test_a_training_pass_is_segment_with_the_heads_embeddings(initialised):
    model, variables = initialised
    image, prompt = inputs()
    pseudo = model.apply(variables, image, **prompt, method=model.fuse).pseudo_image
    view = biclip.View(image, pseudo)
    found, updates = model.apply(
        variables, view, method=model.training_pass, mutable=["batch_stats"]
    )
    (logits, features), same = model.apply(
        variables, view, train=True, method=model.segment, mutable=["batch_stats"]
    )
    np.testing.assert_array_equal(found.logits, logits)
    jax.tree.map(np.testing.assert_array_equal, updates, same)
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
    ("size", "levels", "named"), [(200, 5, "224"), (28, 3, "56"), (56, 5, r"one of \[112, 224")]
)
def test_illegal_sizes_are_refused_with_the_legal_ones(size, levels, named):
    with pytest.raises(ValueError, match=named):
        tiny.model(image_size=size, num_levels=levels)
