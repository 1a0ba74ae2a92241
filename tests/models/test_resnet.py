"""CLIP's ModifiedResNet: sizes of the maps, average and attention pooling by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.models.resnet import AttentionPool, ModifiedResNet, average_pool_2x2

TOWER = ModifiedResNet(image_size=64, width=4, stages=(1, 2, 1, 1), num_heads=2, embedding_size=6)
apply = jax.jit(TOWER.apply)


def noise(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shaken(variables, scale=0.3):
    """Every parameter and statistic away from its initial value, variances positive."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: p + scale * np.abs(rng.normal(size=p.shape)).astype(np.float32), variables
    )


@pytest.fixture(scope="module")
def variables():
    return shaken(jax.jit(TOWER.init)(jax.random.key(0), noise((1, 64, 64, 3))), 0.05)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_the_maps_shrink_from_a_quarter_to_a_thirtysecond(variables, size):
    embedding, aux = apply(variables, noise((2, *size, 3)))
    shapes = [state.shape[1:] for state in aux["hidden_states"]]
    factors, channels = (4, 4, 8, 16, 32), (4, 16, 32, 64, 128)
    expected = [(size[0] // f, size[1] // f, c) for f, c in zip(factors, channels, strict=True)]
    assert shapes == expected
    assert embedding.shape == (2, 6)
    last = aux["hidden_states"][-1]
    np.testing.assert_array_equal(aux["tokens"][1, 1], last[1, 0, 1])
    assert aux["tokens"].shape == (2, size[0] * size[1] // 32**2, 128)


def test_average_pooling_is_the_mean_of_four():
    x = noise((2, 4, 6, 3))
    expected = np.zeros((2, 2, 3, 3))
    for i, j in np.ndindex(2, 3):
        expected[:, i, j] = np.asarray(x)[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
    np.testing.assert_allclose(average_pool_2x2(x), expected, atol=1e-6)


def test_a_constant_picture_gives_one_token_away_from_the_borders(variables):
    _, aux = apply(variables, jnp.full((1, 224, 224, 3), 0.7))
    last = np.asarray(aux["hidden_states"][-1])[0]
    inside = last[2:-2, 2:-2].reshape(-1, 128)
    assert len(inside) == 9
    np.testing.assert_allclose(inside, np.broadcast_to(inside[:1], inside.shape), rtol=1e-4)
    assert np.abs(last[0, 0] - inside[0]).max() > 1e-3


def test_pictures_of_a_batch_do_not_mix(variables):
    pictures = noise((2, 64, 64, 3))
    other = pictures.at[1].set(0)
    np.testing.assert_allclose(
        apply(variables, pictures)[0][0], apply(variables, other)[0][0], atol=1e-5
    )


def test_attention_pooling_is_that_of_the_mean_over_everything():
    pool, x = AttentionPool(side=2, num_heads=2, embedding_size=3), noise((2, 2, 2, 8))
    variables = shaken(pool.init(jax.random.key(0), x))
    params = jax.tree.map(lambda p: np.asarray(p, float), variables["params"])

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    expected = []
    for places in np.asarray(x, float).reshape(2, 4, 8):
        tokens = np.concatenate([places.mean(0, keepdims=True), places]) + params["positions"]
        query, key, value = dense("query", tokens[0]), dense("key", tokens), dense("value", tokens)
        mixed = []
        for part in (slice(0, 4), slice(4, 8)):
            weights = np.exp(key[:, part] @ query[part] / 2)
            mixed.append(weights / weights.sum() @ value[:, part])
        expected.append(dense("out", np.concatenate(mixed)))
    np.testing.assert_allclose(pool.apply(variables, x), expected, atol=1e-5)


def test_training_moves_every_running_statistic(variables):
    train = jax.jit(lambda v, x: TOWER.apply(v, x, train=True, mutable=["batch_stats"]))
    _, updated = train(variables, noise((2, 64, 64, 3)))
    moved = jax.tree.map(
        lambda a, b: bool(jnp.abs(a - b).max() > 1e-6),
        variables["batch_stats"],
        updated["batch_stats"],
    )
    assert jax.tree.all(moved)


def test_a_tower_with_stages_from_json_can_be_compiled(variables):
    listed = ModifiedResNet(
        image_size=64, width=4, stages=[1, 2, 1, 1], num_heads=2, embedding_size=6
    )
    pictures = noise((2, 64, 64, 3))
    found = jax.jit(listed.apply)(variables, pictures)[0]
    np.testing.assert_allclose(found, apply(variables, pictures)[0], atol=1e-6)
