"""Attention, blocks, activations and position tables against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from biclip_jax.models.transformer import ACTIVATIONS, Attention, Block, drop, interpolate_positions
from tests.models.numpy_reference import dense, noise, norm

HEADS, LENGTH, WIDTH = 2, 5, 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, LENGTH, WIDTH)), jnp.float32)
BY_HAND = {"gelu": lambda x: x * ndtr(x), "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x))}

CAUSAL = np.tril(np.ones((1, 1, LENGTH, LENGTH), bool))
PADDED = (np.arange(LENGTH) < np.array([[5], [3], [1]]))[:, None, None, :]
NOTHING = PADDED & (np.arange(3) < 2)[:, None, None, None]  # all keys of the last one are masked
MASKS = {
    "none": None,
    "broadcasts": CAUSAL,
    "per example": PADDED,
    "both": CAUSAL & PADDED,
    "all keys masked": NOTHING,
}


def attention(params, x, mask=None, dropout=None):
    """Loops over heads and queries; a query whose keys are all masked weighs them equally.

    `dropout` (B, heads, L, L) multiplies the attention weights.
    """
    query, key, value = np.split(dense(params["qkv"], x), 3, axis=-1)
    size, mixed = WIDTH // HEADS, np.zeros_like(query)
    mask = np.broadcast_to(True if mask is None else mask, (len(x), 1, LENGTH, LENGTH))
    for b, head, i in np.ndindex(len(x), HEADS, LENGTH):
        visible, part = np.flatnonzero(mask[b, 0, i]), slice(head * size, (head + 1) * size)
        weights = np.exp(key[b, visible, part] @ query[b, i, part] / np.sqrt(size))
        if not len(visible):
            visible, weights = np.arange(LENGTH), np.ones(LENGTH)
        factors = 1 if dropout is None else dropout[b, head, i, visible]
        mixed[b, i, part] = weights / weights.sum() * factors @ value[b, visible, part]
    return dense(params["out"], mixed)


@pytest.mark.parametrize("name", MASKS)
def test_attention_matches_numpy(name):
    module, mask = Attention(HEADS), MASKS[name]
    params = noise(module, X)["params"]
    jax_mask = None if mask is None else jnp.asarray(mask)
    found = jax.jit(module.apply)({"params": params}, X, jax_mask)
    np.testing.assert_allclose(found, attention(params, np.asarray(X, float), mask), atol=1e-5)


def test_attention_dropout_scales_the_remaining_weights():
    rate, keys = 0.4, jax.random.split(jax.random.key(3), len(X))
    factors = np.asarray(drop(jnp.ones((len(X), HEADS, LENGTH, LENGTH)), keys, rate))
    assert 0.3 < (factors == 0).mean() < 0.5 and factors.max() == np.float32(1 / 0.6)
    module = Attention(HEADS, dropout=rate)
    params = noise(module, X)["params"]
    found = module.apply({"params": params}, X, jnp.asarray(PADDED), keys=keys)
    expected = attention(params, np.asarray(X, float), PADDED, factors)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    without = module.apply({"params": params}, X, jnp.asarray(PADDED))
    assert np.abs(without - expected).max() > 0.1


def test_masked_keys_have_no_influence():
    module = Attention(HEADS)
    variables, mask = {"params": noise(module, X)["params"]}, jnp.asarray(PADDED)
    other = jnp.where(mask[:, 0, 0, :, None], X, 1e3)
    apply = jax.jit(module.apply)
    found, expected = apply(variables, other, mask), apply(variables, X, mask)
    for b, length in enumerate(PADDED.sum((1, 2, 3))):
        np.testing.assert_array_equal(found[b, :length], expected[b, :length])


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_block_matches_numpy_for_both_norm_orders(post_norm, activation):
    epsilon = 0.05
    module = Block(HEADS, 12, activation, epsilon, post_norm)
    params, x = noise(module, X)["params"], np.asarray(X, float)

    def mix(x):
        return attention(params["attention"], x, CAUSAL)

    def mlp(x):
        return dense(params["mlp_out"], BY_HAND[activation](dense(params["mlp_in"], x)))

    if post_norm:
        x = norm(params["norm_0"], x + mix(x), epsilon)
        expected = norm(params["norm_1"], x + mlp(x), epsilon)
    else:
        x = x + mix(norm(params["norm_0"], x, epsilon))
        expected = x + mlp(norm(params["norm_1"], x, epsilon))
    found = jax.jit(module.apply)({"params": params}, X, jnp.asarray(CAUSAL))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_match_numpy(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), BY_HAND[name](x), atol=1e-6)


def position_table(*channels):
    """Returns the position table of a 7 x 7 grid after a class row of -1."""
    rows, columns = np.mgrid[:7, :7]
    patches = np.stack([f(rows, columns) for f in channels], -1).reshape(49, -1)
    return jnp.asarray(np.concatenate([np.full((1, len(channels)), -1.0), patches]), jnp.float32)


@pytest.mark.parametrize("grid", [(14, 14), (3, 3), (5, 9)])
def test_interpolation_keeps_class_row_and_constants(grid):
    found = interpolate_positions(position_table(lambda r, c: 0 * r + 3, lambda r, c: r * c), grid)
    assert found.shape == (1 + grid[0] * grid[1], 2)
    np.testing.assert_array_equal(found[0], [-1, -1])
    np.testing.assert_allclose(found[1:, 0], 3, atol=1e-5)


def test_interpolation_to_the_same_grid_is_the_identity():
    table = position_table(lambda r, c: np.sin(r * 7 + c))
    np.testing.assert_array_equal(interpolate_positions(table, (7, 7)), table)


def test_interpolation_keeps_ramps_in_the_interior():
    ramps = position_table(lambda r, c: r, lambda r, c: c)
    found = np.asarray(interpolate_positions(ramps, (14, 14)))[1:].reshape(14, 14, 2)
    expected = (np.arange(14) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(found[5, 4:10, 1], expected[4:10], atol=0.05)
    np.testing.assert_allclose(found[4:10, 5, 0], expected[4:10], atol=0.05)


def test_interpolated_grid_is_row_major():
    ramps = position_table(lambda r, c: r, lambda r, c: c)
    found = np.asarray(interpolate_positions(ramps, (7, 14)))[1:].reshape(7, 14, 2)
    np.testing.assert_allclose(found[..., 0], np.repeat(np.arange(7)[:, None], 14, 1), atol=1e-5)
    assert (np.diff(found[..., 1], axis=1) > 0).all()


def test_downsampling_does_not_antialias():
    values = np.random.default_rng(2).normal(size=(8, 8))
    table = jnp.asarray(np.concatenate([[0], values.ravel()])[:, None], jnp.float32)
    found = np.asarray(interpolate_positions(table, (4, 4)))[1:].reshape(4, 4)
    kernel = np.array([-0.09375, 0.59375, 0.59375, -0.09375])
    for i, j in ((1, 1), (1, 2), (2, 1), (2, 2)):
        window = values[2 * i - 1 : 2 * i + 3, 2 * j - 1 : 2 * j + 3]
        assert found[i, j] == pytest.approx(kernel @ window @ kernel, abs=1e-5)
