"""CLIP's towers: what a token sees, where the sentence is read, the cosine, the published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from biclip_jax.models import clip
from biclip_jax.weights import architectures
from tests.models.by_hand import noise, norm

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
MODEL, TEXT_TOWER = clip.build(CONFIG), clip.build_text_encoder(TEXT)
IMAGE_TOWER = clip.build_image_encoder(IMAGE)
PICTURES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
IDS = jnp.array([[18, 4, 5, END, 0, 0, 0], [18, 6, 7, 8, 9, 10, END], [18, END, 0, 0, 0, 0, 0]])

apply, apply_text, apply_image = map(jax.jit, (MODEL.apply, TEXT_TOWER.apply, IMAGE_TOWER.apply))


@pytest.fixture(scope="module")
def variables():
    return noise(MODEL, PICTURES, IDS, amount=0.4)


@pytest.fixture(scope="module")
def text(variables):
    return {"params": variables["params"]["text_encoder"]}


@pytest.fixture(scope="module")
def image(variables):
    return {"params": variables["params"]["image_encoder"]}


@pytest.fixture(scope="module")
def answer(variables):
    return apply(variables, PICTURES, IDS)


def states(variables, *inputs):
    return np.stack(apply_text(variables, *inputs)[1]["hidden_states"])


@pytest.mark.parametrize("position", [1, 3, 6])
def test_a_later_token_changes_no_earlier_state(text, position):
    before, after = states(text, IDS), states(text, IDS.at[:, position].set(11))
    np.testing.assert_array_equal(before[:, :, :position], after[:, :, :position])
    assert (np.abs(before - after)[1:, :, position:].max(axis=(1, 3)) > 1e-4).all()


def test_the_mask_of_the_padding_changes_no_token_s_state(text):
    mask = jnp.arange(7) < jnp.array([[4], [7], [2]])
    with_mask, without = states(text, IDS, mask), states(text, IDS)
    np.testing.assert_allclose(with_mask[:, mask], without[:, mask], atol=1e-6)
    assert np.abs(with_mask - without).max() > 1e-4


def test_the_sentence_is_read_at_its_end_token(text):
    embedding, aux = apply_text(text, IDS)
    last = np.asarray(aux["hidden_states"][-1])[[0, 1, 2], [3, 6, 1]]
    pooled = norm(text["params"]["norm_post"], last, 1e-5)
    np.testing.assert_allclose(aux["pooled"], pooled, atol=1e-5)
    projected = pooled @ text["params"]["projection"]["kernel"]
    np.testing.assert_allclose(embedding, projected, atol=1e-5)
    for row, end in enumerate((3, 6, 1)):
        np.testing.assert_allclose(aux["tokens"][row, end], projected[row], atol=1e-5)


def test_what_follows_the_end_token_does_not_matter(text):
    padded = jnp.pad(IDS, ((0, 0), (0, 2)), constant_values=3)
    np.testing.assert_allclose(apply_text(text, IDS)[0], apply_text(text, padded)[0], atol=1e-6)


def test_too_many_tokens_are_refused(text):
    with pytest.raises(ValueError, match="10 tokens; the tower has 9 positions"):
        TEXT_TOWER.apply(text, jnp.zeros((1, 10), jnp.int32))


@pytest.mark.parametrize("shape", [(18, 16), (16, 18)])
def test_a_picture_that_is_no_multiple_of_the_patch_is_refused(image, shape):
    said = f"{shape[0]} x {shape[1]}; patches are 4 x 4"
    with pytest.raises(ValueError, match=said):
        IMAGE_TOWER.apply(image, jnp.zeros((1, *shape, 3)))


def test_the_picture_is_read_at_its_class_token(image):
    embedding, aux = apply_image(image, PICTURES)
    np.testing.assert_allclose(aux["tokens"][:, 0], embedding, atol=1e-6)
    assert aux["tokens"].shape == (2, 17, 6)
    assert aux["pooled"].shape == (2, 8)
    assert [state.shape for state in aux["hidden_states"]] == [(2, 17, 8)] * 2


def test_logits_are_scaled_cosines(variables, answer):
    logits, aux = answer
    first = np.asarray(apply_image({"params": variables["params"]["image_encoder"]}, PICTURES)[0])
    second = np.asarray(apply_text({"params": variables["params"]["text_encoder"]}, IDS)[0])
    scale = np.exp(np.asarray(variables["params"]["logit_scale"]))
    for i, t in np.ndindex(2, 3):
        lengths = np.sqrt((first[i] ** 2).sum() * (second[t] ** 2).sum())
        assert logits[i, t] == pytest.approx(scale * (first[i] @ second[t]) / lengths, abs=1e-4)
    for name in ("image_embedding", "text_embedding"):
        np.testing.assert_allclose((np.asarray(aux[name]) ** 2).sum(-1), 1, atol=1e-6)


def test_the_temperature_begins_at_that_of_the_paper():
    init = jax.jit(lambda key: MODEL.init(key, PICTURES, IDS)["params"]["logit_scale"])
    assert init(jax.random.key(0)) == pytest.approx(np.log(1 / 0.07))


def test_two_patches_may_change_places_with_their_positions(image):
    size, (a, b) = 4, ((0, 1), (2, 3))
    pieces = np.asarray(PICTURES).reshape(2, 4, size, 4, size, 3).copy()
    pieces[:, a[0], :, a[1]], pieces[:, b[0], :, b[1]] = (
        pieces[:, b[0], :, b[1]].copy(),
        pieces[:, a[0], :, a[1]].copy(),
    )
    order = np.arange(17)
    order[[1 + 4 * a[0] + a[1], 1 + 4 * b[0] + b[1]]] = 1 + 4 * b[0] + b[1], 1 + 4 * a[0] + a[1]
    params = {**image["params"], "positions": image["params"]["positions"][order]}
    swapped = jnp.asarray(pieces.reshape(2, 16, 16, 3))
    _, moved = apply_image({"params": params}, swapped)
    _, aux = apply_image(image, PICTURES)
    for before, after in zip(aux["hidden_states"], moved["hidden_states"], strict=True):
        np.testing.assert_allclose(after, before[:, order], atol=1e-5)
    _, elsewhere = apply_image(image, swapped)
    assert np.abs(elsewhere["tokens"] - aux["tokens"][:, order]).max() > 1e-3


def test_bfloat16_is_finite_and_near_float32(variables, answer):
    logits, aux = jax.jit(clip.build(CONFIG, "bfloat16").apply)(variables, PICTURES, IDS)
    assert aux["image"]["hidden_states"][-1].dtype == jnp.bfloat16
    assert aux["text"]["hidden_states"][-1].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    for name in ("image_embedding", "text_embedding"):
        np.testing.assert_allclose(aux[name], answer[1][name], atol=0.05)
        assert (aux[name] != answer[1][name]).any()


def test_every_parameter_gets_a_gradient(variables):
    def loss(params):
        logits, _ = MODEL.apply({"params": params}, PICTURES, IDS[:2])
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
def test_the_published_models_have_their_number_of_parameters(image, text, count):
    model, ids = clip.build({"image": image, "text": text}), jnp.zeros((1, 77), jnp.int32)
    shapes = architectures.shapes_of(model, jnp.zeros((1, 224, 224, 3)), ids)
    sizes = [np.prod(shape) for name, shape in shapes.items() if name.startswith("params/")]
    assert sum(sizes) == count
