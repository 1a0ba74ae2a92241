"""The scratch text encoder, and pretrained towers with their states pooled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.models import bert, clip
from biclip_jax.models.text import POOLINGS, PooledTextEncoder, TextEncoder
from tests.models.by_hand import noise

ENCODER = TextEncoder(vocab_size=20, max_length=8, width=16, num_layers=2, num_heads=4)
IDS = jnp.array([[2, 5, 6, 7, 0, 0], [2, 7, 6, 5, 0, 0]])
MASK = IDS > 0


@pytest.fixture(scope="module")
def variables():
    return ENCODER.init(jax.random.key(0), IDS, MASK)


def test_gives_one_vector_a_sentence_that_depends_on_word_order(variables):
    out = ENCODER.apply(variables, IDS, MASK)
    assert out.shape == (2, 16)
    assert np.abs(out[0] - out[1]).max() > 1e-4


def test_padding_length_and_content_do_not_matter(variables):
    out = ENCODER.apply(variables, IDS, MASK)
    longer = jnp.pad(IDS, ((0, 0), (0, 2)), constant_values=9)
    padded = ENCODER.apply(variables, longer, jnp.pad(MASK, ((0, 0), (0, 2))))
    np.testing.assert_allclose(out, padded, atol=1e-6)


def test_is_the_mean_of_the_normalised_last_layer_over_real_tokens(variables):
    out, state = ENCODER.apply(
        variables, IDS, MASK, capture_intermediates=True, mutable=["intermediates"]
    )
    last = np.asarray(state["intermediates"]["norm"]["__call__"][0])
    np.testing.assert_allclose(out, last[:, :4].mean(1), atol=1e-6)


def test_an_empty_mask_does_not_divide_by_zero(variables):
    assert np.isfinite(ENCODER.apply(variables, IDS, jnp.zeros_like(MASK))).all()


FIELDS = {
    "vocab_size": 20,
    "max_length": 8,
    "width": 8,
    "num_layers": 3,
    "num_heads": 2,
    "mlp_width": 12,
}
TOWERS: dict[str, nn.Module] = {
    "bert": bert.build(FIELDS | {"projection_size": 6}),
    "clip": clip.build_text_encoder(FIELDS | {"embedding_size": 6}),
}


@pytest.fixture(scope="module", params=TOWERS)
def encoder(request):
    """(tower, its variables, a function of them that gives every pooling and the intermediates)."""
    module = TOWERS[request.param]

    @jax.jit
    def everything(variables, ids, mask):
        inside = {"params": {"pretrained": variables["params"]}}
        pooled = {
            name: PooledTextEncoder(module, name).apply(inside, ids, mask) for name in POOLINGS
        }
        return pooled, module.apply(variables, ids, mask)

    return module, noise(module, IDS, MASK), everything


def test_each_pooling_is_what_it_says(encoder):
    module, variables, everything = encoder
    mask = IDS.at[1, 3].set(0) > 0
    pooled, (embedding, aux) = everything(variables, IDS, mask)
    states = [np.asarray(state) for state in aux["hidden_states"]]
    assert len(states) == 4
    mean = (states[1] + states[2] + states[3]) / 3
    by_hand = {
        "all_tokens": mean.sum(1) / 6,
        "masked": np.stack([mean[0, :4].sum(0) / 4, mean[1, :3].sum(0) / 3]),
        "embedding": embedding,
    }
    assert by_hand.keys() == pooled.keys()
    for name, expected in by_hand.items():
        np.testing.assert_allclose(pooled[name], expected, atol=1e-5)
        assert pooled[name].shape[1] == PooledTextEncoder(module, name).num_features


def test_the_padding_s_length_matters_to_all_tokens_alone(encoder):
    _, variables, everything = encoder
    pad = ((0, 0), (0, 2))
    short, _ = everything(variables, IDS, MASK)
    longer, _ = everything(variables, jnp.pad(IDS, pad), jnp.pad(MASK, pad))
    for name in ("masked", "embedding"):
        np.testing.assert_allclose(longer[name], short[name], atol=1e-5)
    difference = np.abs(longer["all_tokens"] - short["all_tokens"]).max(axis=1)
    assert (difference > 1e-3).all()


def test_pooled_vectors_are_float32_whatever_the_tower_computes_in(encoder):
    module, variables, _ = encoder
    inside = {"params": {"pretrained": variables["params"]}}
    for name in POOLINGS:
        pooled = PooledTextEncoder(module.clone(dtype=jnp.bfloat16), name)
        assert jax.eval_shape(pooled.apply, inside, IDS, MASK).dtype == jnp.float32
