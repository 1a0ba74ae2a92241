"""The scratch text encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.models.text import TextEncoder

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
