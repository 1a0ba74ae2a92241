"""Parameters of noise, and layers in NumPy to compare with."""

import jax
import jax.numpy as jnp
import numpy as np


def noise(model, *inputs, seed=0, amount=0.3):
    """Variables without running or compiling `init`: scales and variances near 1, the rest near 0.

    Args:
      model: a module.
      inputs: of its call.
      seed: of the noise.
      amount: its standard deviation.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, shaped):
        values = amount * rng.normal(size=shaped.shape)
        if path[-1].key in ("scale", "var"):
            values = 1 + np.abs(values)
        return jnp.asarray(values, jnp.float32)

    shapes = jax.eval_shape(lambda key: model.init(key, *inputs), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def dense(params, x):
    """x W + b."""
    return np.asarray(x, float) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])


def norm(params, x, epsilon):
    """LayerNorm over the last axis."""
    x = np.asarray(x, float)
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return scaled * np.asarray(params["scale"]) + np.asarray(params["bias"])
