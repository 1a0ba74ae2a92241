"""A tiny model, batch and train step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from biclip_jax.models import biclip
from biclip_jax.training import optim, state, steps, views

VOCAB_SIZE, MAX_LENGTH, IMAGE_SIZE = 12, 8, 56
WEIGHTS = {"gen": 0.1, "iac": 0.05, "cycle": 0.07}


def model_config(**changes):
    """The fields of `config.model`, at tiny size."""
    text = {"encoder": "scratch", "width": 8, "num_layers": 1, "num_heads": 2}
    text["max_length"] = MAX_LENGTH
    config = {"image_size": IMAGE_SIZE, "width": 2, "num_levels": 3, "dtype": "float32"}
    return {**config, "text": text, **changes}


def model(axis_name=None, **changes):
    """The model of `model_config`."""
    return biclip.build(model_config(**changes), vocab_size=VOCAB_SIZE, axis_name=axis_name)


def init(model, seed=0):
    """Fresh variables of a model that takes ids."""
    ids = jnp.zeros((1, MAX_LENGTH), jnp.int32)
    return biclip.init(model, jax.random.key(seed), {"text_ids": ids, "text_mask": ids == 0})


def batch(size=4, seed=0):
    """A `Batch` of noise; the mask is where the picture is bright."""
    rng = np.random.default_rng(seed)
    shape = (size, IMAGE_SIZE, IMAGE_SIZE)
    image = rng.integers(0, 256, (*shape, 1)).astype(np.uint8)
    ids = rng.integers(3, VOCAB_SIZE, (size, MAX_LENGTH)).astype(np.int32)
    fields = {
        "image": image,
        "mask": (image > 127).astype(np.uint8),
        "text_ids": ids,
        "text_mask": np.arange(MAX_LENGTH)[None] < rng.integers(2, MAX_LENGTH, (size, 1)),
        "row": np.arange(size, dtype=np.int32),
        "index": np.arange(size, dtype=np.int32),
        "valid": np.ones(size, bool),
    }
    return {name: jnp.asarray(value) for name, value in fields.items()}


def train_step(axis_name=None, optimizer="adamw", accumulate=1, learning_rate=1e-2):
    """(step, state, batch, key) with everything but these bound."""
    tiny = model(axis_name)
    config = {"name": optimizer, "weight_decay": 0.01, "clip_norm": 0.0}
    tx = optim.make_optimizer(config, learning_rate)
    objective = partial(
        steps.published_objective, model=tiny, weights=WEIGHTS, geometry=views.Geometry()
    )
    step = partial(
        steps.train_step,
        objective=objective,
        optimizer=tx,
        accumulate=accumulate,
        axis_name=axis_name,
    )
    variables = init(tiny)
    return step, state.create(variables, tx), batch(), jax.random.key(1)
