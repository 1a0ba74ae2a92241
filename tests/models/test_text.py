"""The scratch text encoder, and pretrained towers with their states pooled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.models import bert, clip
from biclip_jax.models.text import POOLINGS, PooledTower, TextEncoder

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
    "num_layers": 4,
    "num_heads": 2,
    "mlp_width": 12,
}
TOWERS = {
    "bert": bert.build(FIELDS | {"projection_size": 6}),
    "clip": clip.build_text_encoder(FIELDS | {"embedding_size": 6}),
}


@pytest.fixture(scope="module", params=TOWERS)
def tower(request):
    """(tower, its parameters, all of them noise)."""
    module, rng = TOWERS[request.param], np.random.default_rng(0)
    params = jax.jit(module.init)(jax.random.key(0), IDS, MASK)["params"]
    noise = lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32)
    return module, jax.tree.map(noise, params)


def pool(tower, pooling, ids, mask):
    module, params = tower
    return PooledTower(module, pooling).apply({"params": {"tower": params}}, ids, mask)


def test_each_pooling_is_what_it_says(tower):
    module, params = tower
    mask = IDS.at[1, 3].set(0) > 0
    embedding, aux = module.apply({"params": params}, IDS, mask)
    states = [np.asarray(state) for state in aux["hidden_states"]]
    assert len(states) == 5
    mean = (states[1] + states[2] + states[4]) / 3
    by_hand = {
        "all_tokens": mean.sum(1) / 6,
        "masked": np.stack([mean[0, :4].sum(0) / 4, mean[1, :3].sum(0) / 3]),
        "embedding": embedding,
    }
    assert set(by_hand) == set(POOLINGS)
    for pooling, expected in by_hand.items():
        found = pool(tower, pooling, IDS, mask)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert found.shape[1] == PooledTower(module, pooling).num_features


def test_the_padding_s_length_matters_to_all_tokens_alone(tower):
    pad = ((0, 0), (0, 2))
    longer = jnp.pad(IDS, pad), jnp.pad(MASK, pad)
    for pooling in ("masked", "embedding"):
        found, expected = pool(tower, pooling, *longer), pool(tower, pooling, IDS, MASK)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    difference = pool(tower, "all_tokens", *longer) - pool(tower, "all_tokens", IDS, MASK)
    assert (np.abs(difference).max(axis=1) > 1e-3).all()


def test_pooled_vectors_are_float32_whatever_the_tower_computes_in(tower):
    module, params = tower
    narrow = module.clone(dtype=jnp.bfloat16)
    for pooling in POOLINGS:
        assert pool((narrow, params), pooling, IDS, MASK).dtype == jnp.float32
