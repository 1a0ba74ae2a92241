"""CLIP's encoders: attention masks, pooled tokens, cosine logits, published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from biclip_jax.models import clip
from biclip_jax.weights import architectures
from tests.models.numpy_reference import noise, norm

IMAGE = {
    "kind": "vit",
    "image_size": 16,
    "patch_size": 4,
    "width": 8,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_width": 12,
    "embedding_size": 6,
}
TEXT = {
    "vocab_size": 20,
    "max_length": 9,
    "width": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_width": 12,
    "embedding_size": 6,
}
CONFIG, END = {"image": IMAGE, "text": TEXT}, 19
MODEL, TEXT_ENCODER = clip.build(CONFIG), clip.build_text_encoder(TEXT)
IMAGE_ENCODER = clip.build_image_encoder(IMAGE)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
IDS = jnp.array([[18, 4, 5, END, 0, 0, 0], [18, 6, 7, 8, 9, 10, END], [18, END, 0, 0, 0, 0, 0]])

apply, apply_text, apply_image = map(
    jax.jit, (MODEL.apply, TEXT_ENCODER.apply, IMAGE_ENCODER.apply)
)


@pytest.fixture(scope="module")
def variables():
    return noise(MODEL, IMAGES, IDS, amount=0.4)


@pytest.fixture(scope="module")
def text(variables):
    return {"params": variables["params"]["text_encoder"]}


@pytest.fixture(scope="module")
def image(variables):
    return {"params": variables["params"]["image_encoder"]}


@pytest.fixture(scope="module")
def outputs(variables):
    return apply(variables, IMAGES, IDS)


def states(variables, *inputs):
    return np.stack(apply_text(variables, *inputs)[1]["hidden_states"])


@pytest.mark.parametrize("position", [1, 3, 6])
def test_text_attention_is_causal(text, position):
    before, after = states(text, IDS), states(text, IDS.at[:, position].set(11))
    np.testing.assert_array_equal(before[:, :, :position], after[:, :, :position])
    assert (np.abs(before - after)[1:, :, position:].max(axis=(1, 3)) > 1e-4).all()


def test_padding_mask_does_not_change_token_states(text):
    mask = jnp.arange(7) < jnp.array([[4], [7], [2]])
    with_mask, without = states(text, IDS, mask), states(text, IDS)
    np.testing.assert_allclose(with_mask[:, mask], without[:, mask], atol=1e-6)
    assert np.abs(with_mask - without).max() > 1e-4


def test_text_is_pooled_at_the_end_token(text):
    embedding, aux = apply_text(text, IDS)
    last = np.asarray(aux["hidden_states"][-1])[[0, 1, 2], [3, 6, 1]]
    pooled = norm(text["params"]["norm_post"], last, 1e-5)
    np.testing.assert_allclose(aux["pooled"], pooled, atol=1e-5)
    projected = pooled @ text["params"]["projection"]["kernel"]
    np.testing.assert_allclose(embedding, projected, atol=1e-5)
    for row, end in enumerate((3, 6, 1)):
        np.testing.assert_allclose(aux["tokens"][row, end], projected[row], atol=1e-5)


def test_tokens_after_the_end_token_have_no_influence(text):
    padded = jnp.pad(IDS, ((0, 0), (0, 2)), constant_values=3)
    np.testing.assert_allclose(apply_text(text, IDS)[0], apply_text(text, padded)[0], atol=1e-6)


def test_rejects_too_many_tokens(text):
    with pytest.raises(ValueError, match="10 tokens; the text encoder has 9 positions"):
        TEXT_ENCODER.apply(text, jnp.zeros((1, 10), jnp.int32))


@pytest.mark.parametrize("shape", [(18, 16), (16, 18)])
def test_rejects_image_sides_that_are_no_multiple_of_the_patch(image, shape):
    message = f"{shape[0]} x {shape[1]}; the patches are 4 x 4"
    with pytest.raises(ValueError, match=message):
        IMAGE_ENCODER.apply(image, jnp.zeros((1, *shape, 3)))


def test_image_is_pooled_at_the_class_token(image):
    embedding, aux = apply_image(image, IMAGES)
    np.testing.assert_allclose(aux["tokens"][:, 0], embedding, atol=1e-6)
    assert aux["tokens"].shape == (2, 17, 6)
    assert aux["pooled"].shape == (2, 8)
    assert [state.shape for state in aux["hidden_states"]] == [(2, 17, 8)] * 2


def test_logits_are_scaled_cosines(variables, outputs):
    logits, aux = outputs
    params = variables["params"]
    image = np.asarray(apply_image({"params": params["image_encoder"]}, IMAGES)[0])
    text = np.asarray(apply_text({"params": params["text_encoder"]}, IDS)[0])
    scale = np.exp(np.asarray(params["logit_scale"]))
    for i, t in np.ndindex(2, 3):
        norms = np.sqrt((image[i] ** 2).sum() * (text[t] ** 2).sum())
        assert logits[i, t] == pytest.approx(scale * (image[i] @ text[t]) / norms, abs=1e-4)
    for name in ("image_embedding", "text_embedding"):
        np.testing.assert_allclose((np.asarray(aux[name]) ** 2).sum(-1), 1, atol=1e-6)


def test_initial_temperature_is_that_of_the_paper():
    init = jax.jit(lambda key: MODEL.init(key, IMAGES, IDS)["params"]["logit_scale"])
    assert init(jax.random.key(0)) == pytest.approx(np.log(1 / 0.07))


def test_swapping_patches_with_their_positions_permutes_the_tokens(image):
    size, (a, b) = 4, ((0, 1), (2, 3))
    pieces = np.asarray(IMAGES).reshape(2, 4, size, 4, size, 3).copy()
    pieces[:, a[0], :, a[1]], pieces[:, b[0], :, b[1]] = (
        pieces[:, b[0], :, b[1]].copy(),
        pieces[:, a[0], :, a[1]].copy(),
    )
    order = np.arange(17)
    order[[1 + 4 * a[0] + a[1], 1 + 4 * b[0] + b[1]]] = 1 + 4 * b[0] + b[1], 1 + 4 * a[0] + a[1]
    params = {**image["params"], "positions": image["params"]["positions"][order]}
    swapped = jnp.asarray(pieces.reshape(2, 16, 16, 3))
    _, permuted = apply_image({"params": params}, swapped)
    _, aux = apply_image(image, IMAGES)
    for before, after in zip(aux["hidden_states"], permuted["hidden_states"], strict=True):
        np.testing.assert_allclose(after, before[:, order], atol=1e-5)
    _, same_positions = apply_image(image, swapped)
    assert np.abs(same_positions["tokens"] - aux["tokens"][:, order]).max() > 1e-3


def test_bfloat16_is_close_to_float32(variables, outputs):
    logits, aux = jax.jit(clip.build(CONFIG, "bfloat16").apply)(variables, IMAGES, IDS)
    assert aux["image"]["hidden_states"][-1].dtype == jnp.bfloat16
    assert aux["text"]["hidden_states"][-1].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    for name in ("image_embedding", "text_embedding"):
        np.testing.assert_allclose(aux[name], outputs[1][name], atol=0.05)
        assert (aux[name] != outputs[1][name]).any()


def test_every_parameter_gets_a_gradient(variables):
    def loss(params):
        logits, _ = MODEL.apply({"params": params}, IMAGES, IDS[:2])
        return -jnp.diag(jax.nn.log_softmax(logits)).mean()

    gradients = flatten_dict(jax.jit(jax.grad(loss))(variables["params"]), sep="/")
    assert gradients.keys() == flatten_dict(variables["params"], sep="/").keys()
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 1e-7, name


@pytest.mark.parametrize(
    ("image", "text", "count"),
    [
        (clip.VIT_B16, clip.TEXT, 149_620_737),
        (clip.VIT_B32, clip.TEXT, 151_277_313),
        (clip.RN50, clip.TEXT | {"embedding_size": 1024}, 102_007_137),
    ],
    ids=["ViT-B/16", "ViT-B/32", "RN50"],
)
def test_published_parameter_counts(image, text, count):
    model, ids = clip.build({"image": image, "text": text}), jnp.zeros((1, 77), jnp.int32)
    shapes = architectures.shapes_of(model, jnp.zeros((1, 224, 224, 3)), ids)
    sizes = [np.prod(shape) for name, shape in shapes.items() if name.startswith("params/")]
    assert sum(sizes) == count
