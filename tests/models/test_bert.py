"""BERT: embeddings and projection head against NumPy, padding and attention masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from biclip_jax.models import bert
from biclip_jax.weights import architectures
from tests.models.numpy_reference import dense, noise, norm

CONFIG = {
    "vocab_size": 20,
    "max_length": 9,
    "width": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_width": 12,
    "projection_size": 6,
}
ENCODER, WITHOUT_HEAD = bert.build(CONFIG), bert.build(CONFIG | {"projection_size": 0})
IDS = jnp.array([[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 10, 3]])
MASK = IDS > 0
apply = jax.jit(ENCODER.apply)


@pytest.fixture(scope="module")
def variables():
    return noise(ENCODER, IDS, MASK)


def states(variables, ids, mask):
    return np.stack(apply(variables, ids, mask)[1]["hidden_states"])


def test_padding_does_not_change_token_states(variables):
    expected = states(variables, IDS, MASK)[:, MASK]
    content = states(variables, jnp.where(MASK, IDS, 13), MASK)[:, MASK]
    np.testing.assert_array_equal(content, expected)
    pad = ((0, 0), (0, 3))
    longer = states(variables, jnp.pad(IDS, pad), jnp.pad(MASK, pad))[:, :, :6][:, MASK]
    np.testing.assert_allclose(longer, expected, atol=1e-5)


def test_attention_is_bidirectional(variables):
    before, after = states(variables, IDS, MASK), states(variables, IDS.at[1, 5].set(11), MASK)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    np.testing.assert_array_equal(before[0, 1, :5], after[0, 1, :5])
    assert (np.abs(before - after)[1:, 1].max(-1) > 1e-5).all()


def test_embeddings_are_the_normalised_sum_of_three_tables(variables):
    params = variables["params"]
    words = np.asarray(params["words"]["embedding"])[IDS]
    total = words + np.asarray(params["positions"])[:6] + np.asarray(params["segments"])[0]
    found = states(variables, IDS, MASK)[0]
    np.testing.assert_allclose(found, norm(params["norm"], total, 1e-12), atol=1e-5)


def test_head_projects_the_first_token(variables):
    embedding, aux = apply(variables, IDS, MASK)
    head = variables["params"]["projection"]
    x = np.asarray(aux["hidden_states"][-1])[:, 0]
    x = dense(head["hidden"], x)
    x = norm(head["norm"], x * ndtr(x), 1e-12)
    np.testing.assert_allclose(embedding, dense(head["out"], x), atol=1e-5)
    assert ENCODER.embedding_size == 6


def test_embedding_without_head_is_the_first_token(variables):
    params = {k: v for k, v in variables["params"].items() if k != "projection"}
    embedding, aux = jax.jit(WITHOUT_HEAD.apply)({"params": params}, IDS, MASK)
    np.testing.assert_array_equal(embedding, aux["hidden_states"][-1][:, 0])
    assert WITHOUT_HEAD.embedding_size == 8


def test_rejects_too_many_tokens(variables):
    ids = jnp.ones((1, 10), jnp.int32)
    with pytest.raises(ValueError, match="10 tokens; the text encoder has 9 positions"):
        ENCODER.apply(variables, ids, ids > 0)


def test_bfloat16_is_close_to_float32(variables):
    embedding, aux = jax.jit(bert.build(CONFIG, "bfloat16").apply)(variables, IDS, MASK)
    assert aux["hidden_states"][-1].dtype == jnp.bfloat16
    expected = states(variables, IDS, MASK)[-1][MASK]
    found = np.asarray(aux["hidden_states"][-1], np.float32)[MASK]
    np.testing.assert_allclose(found, expected, atol=0.2)
    assert np.isfinite(np.asarray(embedding, np.float32)).all()


def test_bert_base_parameter_count():
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = architectures.shapes_of(bert.Bert(), ids, ids > 0)
    assert sum(np.prod(shape) for shape in shapes.values()) == 108_891_648
