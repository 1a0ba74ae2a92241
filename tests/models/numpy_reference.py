"""Random parameters, and NumPy references of layers."""

import jax
import jax.numpy as jnp
import numpy as np


def noise(model, *inputs, seed=0, amount=0.3):
    """Returns random variables without running or compiling `init`.

    Scales and variances are near 1, everything else near 0.

    Args:
      model: A module.
      inputs: Inputs of its call.
      seed: Seed of the noise.
      amount: Standard deviation of the noise.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        values = amount * rng.normal(size=shape.shape)
        if path[-1].key in ("scale", "var"):
            values = 1 + np.abs(values)
        return jnp.asarray(values, jnp.float32)

    shapes = jax.eval_shape(lambda key: model.init(key, *inputs), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def dense(params, x):
    """Computes x W + b."""
    return np.asarray(x, float) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])


def norm(params, x, epsilon):
    """Computes LayerNorm over the last axis."""
    x = np.asarray(x, float)
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return scaled * np.asarray(params["scale"]) + np.asarray(params["bias"])
