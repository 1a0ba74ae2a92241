"""CLIP's ModifiedResNet: sizes of the maps; average and attention pooling against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.models.resnet import AttentionPool, Bottleneck, ModifiedResNet, average_pool_2x2
from tests.models import numpy_reference

ENCODER = ModifiedResNet(image_size=64, width=4, stages=(1, 2, 1, 1), num_heads=2, embedding_size=6)
apply = jax.jit(ENCODER.apply)


def images(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def variables():
    return numpy_reference.noise(ENCODER, images(1, 64, 64, 3), amount=0.2)


@pytest.mark.parametrize("size", [(64, 96), (224, 224)])
def test_maps_shrink_from_a_quarter_to_a_thirty_second(variables, size):
    embedding, aux = apply(variables, images(1, *size, 3))
    shapes = [state.shape[1:] for state in aux["hidden_states"]]
    factors, channels = (4, 4, 8, 16, 32), (4, 16, 32, 64, 128)
    expected = [(size[0] // f, size[1] // f, c) for f, c in zip(factors, channels, strict=True)]
    assert shapes == expected
    assert embedding.shape == (1, 6)
    last = aux["hidden_states"][-1]
    np.testing.assert_array_equal(aux["tokens"][0, size[1] // 32], last[0, 1, 0])
    assert aux["tokens"].shape == (1, size[0] * size[1] // 32**2, 128)


def test_average_pooling_is_the_mean_of_2x2_blocks():
    x = images(2, 4, 6, 3)
    expected = np.zeros((2, 2, 3, 3))
    for i, j in np.ndindex(2, 3):
        expected[:, i, j] = np.asarray(x)[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
    np.testing.assert_allclose(average_pool_2x2(x), expected, atol=1e-6)


def test_constant_image_gives_constant_interior_tokens(variables):
    _, aux = apply(variables, jnp.full((1, 224, 224, 3), 0.7))
    last = np.asarray(aux["hidden_states"][-1])[0]
    interior = last[2:-2, 2:-2].reshape(-1, 128)
    assert len(interior) == 9
    np.testing.assert_allclose(interior, np.broadcast_to(interior[:1], interior.shape), rtol=1e-4)
    assert np.abs(last[0, 0] - interior[0]).max() > 1e-3


def test_attention_pooling_matches_numpy():
    pool, x = AttentionPool(side=2, num_heads=2, embedding_size=3), images(2, 2, 2, 8)
    variables = numpy_reference.noise(pool, x)
    params = variables["params"]

    def dense(name, x):
        return numpy_reference.dense(params[name], x)

    expected = []
    for pixels in np.asarray(x, float).reshape(2, 4, 8):
        tokens = np.concatenate([pixels.mean(0, keepdims=True), pixels])
        tokens = tokens + np.asarray(params["positions"])
        query, key, value = dense("query", tokens[0]), dense("key", tokens), dense("value", tokens)
        mixed = []
        for part in (slice(0, 4), slice(4, 8)):
            weights = np.exp(key[:, part] @ query[part] / 2)
            mixed.append(weights / weights.sum() @ value[:, part])
        expected.append(dense("out", np.concatenate(mixed)))
    np.testing.assert_allclose(pool.apply(variables, x), expected, atol=1e-5)


def test_training_updates_every_running_statistic_of_a_block():
    block, x = Bottleneck(2, stride=2), images(2, 4, 4, 3)
    variables = numpy_reference.noise(block, x, False)
    train = jax.jit(lambda v, x: block.apply(v, x, True, mutable=["batch_stats"])[1])
    updated = train(variables, x)
    assert set(updated["batch_stats"]) == {"norm_0", "norm_1", "norm_2", "norm_skip"}
    for name, before in variables["batch_stats"].items():
        for statistic, value in before.items():
            assert np.abs(value - updated["batch_stats"][name][statistic]).max() > 1e-3


def test_encoder_with_stages_from_json_can_be_compiled(variables):
    encoder = ModifiedResNet(
        image_size=64, width=4, stages=[1, 2, 1, 1], num_heads=2, embedding_size=6
    )
    jax.jit(encoder.apply).trace(variables, images(2, 64, 64, 3))
