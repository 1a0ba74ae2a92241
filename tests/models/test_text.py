"""The scratch text encoder, and pretrained text encoders with pooled hidden states."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.models import bert, clip
from biclip_jax.models.text import POOLINGS, PooledTextEncoder, TextEncoder
from tests.models.numpy_reference import noise

ENCODER = TextEncoder(vocab_size=20, max_length=8, width=16, num_layers=2, num_heads=4)
IDS = jnp.array([[2, 5, 6, 7, 0, 0], [2, 7, 6, 5, 0, 0]])
MASK = IDS > 0


@pytest.fixture(scope="module")
def variables():
    return ENCODER.init(jax.random.key(0), IDS, MASK)


def test_embedding_depends_on_word_order(variables):
    out = ENCODER.apply(variables, IDS, MASK)
    assert out.shape == (2, 16)
    assert np.abs(out[0] - out[1]).max() > 1e-4


def test_padding_has_no_influence(variables):
    out = ENCODER.apply(variables, IDS, MASK)
    longer = jnp.pad(IDS, ((0, 0), (0, 2)), constant_values=9)
    padded = ENCODER.apply(variables, longer, jnp.pad(MASK, ((0, 0), (0, 2))))
    np.testing.assert_allclose(out, padded, atol=1e-6)


def test_embedding_is_the_masked_mean_of_the_last_layer(variables):
    out, state = ENCODER.apply(
        variables, IDS, MASK, capture_intermediates=True, mutable=["intermediates"]
    )
    last = np.asarray(state["intermediates"]["norm"]["__call__"][0])
    np.testing.assert_allclose(out, last[:, :4].mean(1), atol=1e-6)


def test_empty_mask_gives_finite_values(variables):
    assert np.isfinite(ENCODER.apply(variables, IDS, jnp.zeros_like(MASK))).all()


FIELDS = {
    "vocab_size": 20,
    "max_length": 8,
    "width": 8,
    "num_layers": 3,
    "num_heads": 2,
    "mlp_width": 12,
}
PRETRAINED: dict[str, nn.Module] = {
    "bert": bert.build(FIELDS | {"projection_size": 6}),
    "clip": clip.build_text_encoder(FIELDS | {"embedding_size": 6}),
}


@pytest.fixture(scope="module", params=PRETRAINED)
def encoder(request):
    """Returns (encoder, variables, function that computes all poolings and intermediates)."""
    module = PRETRAINED[request.param]

    @jax.jit
    def apply(variables, ids, mask):
        nested = {"params": {"pretrained": variables["params"]}}
        pooled = {
            name: PooledTextEncoder(module, name).apply(nested, ids, mask) for name in POOLINGS
        }
        return pooled, module.apply(variables, ids, mask)

    return module, noise(module, IDS, MASK), apply


def test_poolings_match_numpy(encoder):
    module, variables, apply = encoder
    mask = IDS.at[1, 3].set(0) > 0
    pooled, (embedding, aux) = apply(variables, IDS, mask)
    states = [np.asarray(state) for state in aux["hidden_states"]]
    assert len(states) == 4
    mean = (states[1] + states[2] + states[3]) / 3
    references = {
        "all_tokens": mean.sum(1) / 6,
        "masked": np.stack([mean[0, :4].sum(0) / 4, mean[1, :3].sum(0) / 3]),
        "embedding": embedding,
    }
    assert references.keys() == pooled.keys()
    for name, expected in references.items():
        np.testing.assert_allclose(pooled[name], expected, atol=1e-5)
        assert pooled[name].shape[1] == PooledTextEncoder(module, name).num_features


def test_only_all_tokens_pooling_depends_on_padding_length(encoder):
    _, variables, apply = encoder
    pad = ((0, 0), (0, 2))
    short, _ = apply(variables, IDS, MASK)
    longer, _ = apply(variables, jnp.pad(IDS, pad), jnp.pad(MASK, pad))
    for name in ("masked", "embedding"):
        np.testing.assert_allclose(longer[name], short[name], atol=1e-5)
    difference = np.abs(longer["all_tokens"] - short["all_tokens"]).max(axis=1)
    assert (difference > 1e-3).all()


def test_pooled_vectors_of_a_bfloat16_encoder_are_float32(encoder):
    module, variables, _ = encoder
    nested = {"params": {"pretrained": variables["params"]}}
    for name in POOLINGS:
        pooled = PooledTextEncoder(module.clone(dtype=jnp.bfloat16), name)
        assert jax.eval_shape(pooled.apply, nested, IDS, MASK).dtype == jnp.float32
