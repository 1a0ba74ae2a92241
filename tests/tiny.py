"""A tiny BiCLIP model, batch and train step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from biclip_jax.configs import common, variants
from biclip_jax.experiment import biclip_spec
from biclip_jax.models import biclip
from biclip_jax.training import optim, state, steps
from biclip_jax.training.objectives import biclip as objective

VOCAB_SIZE, MAX_LENGTH, IMAGE_SIZE = 12, 8, 56
WEIGHTS = {"gen": 0.1, "iac": 0.05, "cycle": 0.07}


def model_config(**changes):
    """Returns the fields of `config.model` that every model folder has, at tiny size."""
    text = {"encoder": "scratch", "width": 8, "num_layers": 1, "num_heads": 2}
    text["max_length"] = MAX_LENGTH
    config = {"image_size": IMAGE_SIZE, "width": 2, "num_levels": 3, "dtype": "float32"}
    return {**config, "text": text, **changes}


def config(method="published", **changes):
    """Returns the config of a method of `configs/variants.py`, at tiny size."""
    fields = common.base()
    variants.METHODS[method](fields)
    small = model_config()
    fields.model.update({**small, "bmf": {"hidden": 8}})
    fields.update(changes)
    return fields


def model(axis_name=None, method="", **changes):
    """Builds the model of `model_config`, or of a method."""
    fields = biclip_spec.model_fields(config(method)) if method else model_config()
    return biclip.build({**fields, **changes}, vocab_size=VOCAB_SIZE, axis_name=axis_name)


def init(model, seed=0):
    """Returns random variables of a model that takes ids; `biclip.init` compiles slowly."""
    ids = jnp.zeros((1, MAX_LENGTH), jnp.int32)
    text, rng = {"text_ids": ids, "text_mask": ids == 0}, np.random.default_rng(seed)

    def random_leaf(path, x):
        if x.ndim > 1:
            return jnp.asarray(rng.standard_normal(x.shape) / np.sqrt(x[..., 0].size), x.dtype)
        return x + (path[-1].key in ("scale", "var"))

    zeros = abstract_init(model, jax.random.key(0), text)
    return jax.tree_util.tree_map_with_path(random_leaf, zeros)


def abstract_init(model, key, text):
    """Replaces `biclip.init` without its computation: zeros of the right shapes."""
    image = jnp.zeros((1, model.image_size, model.image_size, 3))
    shapes = jax.eval_shape(model.init, key, image, **text)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), {"batch_stats": {}, **shapes})


def noisy(variables, seed=0, scale=0.1):
    """Perturbs parameters, so that none is exactly zero or one."""
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    perturbed = [x + scale * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    return {**jax.tree.unflatten(tree, perturbed), "batch_stats": variables["batch_stats"]}


def batch(size=4, seed=0, labelled=None):
    """Returns a random `Batch`; the masks of labelled rows are the bright pixels."""
    rng = np.random.default_rng(seed)
    shape = (size, IMAGE_SIZE, IMAGE_SIZE)
    image = rng.integers(0, 256, (*shape, 1)).astype(np.uint8)
    ids = rng.integers(3, VOCAB_SIZE, (size, MAX_LENGTH)).astype(np.int32)
    mask = np.arange(MAX_LENGTH)[None] < rng.integers(2, MAX_LENGTH, (size, 1))
    is_labelled = np.arange(size) < (size if labelled is None else labelled)
    fields = {
        "image": image,
        "mask": ((image > 127) & is_labelled[:, None, None, None]).astype(np.uint8),
        "text_ids": ids,
        "text_mask": mask,
        "has_text": np.ones(size, bool),
        "swapped_text_ids": ids[:, ::-1],
        "swapped_text_mask": mask,
        "swapped_has_text": np.ones(size, bool),
        "labelled": is_labelled,
        "row": np.arange(size, dtype=np.int32),
        "index": np.arange(size, dtype=np.int32),
        "valid": np.ones(size, bool),
    }
    return {name: jnp.asarray(value) for name, value in fields.items()}


def recipe(method="published", labelled=1.0, **changes):
    """Returns the recipe of a method with some fields replaced."""
    return objective.make_recipe(config(method).to_dict(), labelled)._replace(**changes)


def train_step(
    axis_name=None,
    optimizer="adamw",
    accumulate=1,
    learning_rate=1e-2,
    method="published",
    size=4,
    num_shards=1,
    dtype="float32",
):
    """Returns (step, state, batch, key) with all arguments bound.

    With `semi`, half of the rows have masks.
    """
    network = model(axis_name, method, dtype=dtype)
    fields = {
        "name": optimizer,
        "weight_decay": 0.01,
        "clip_norm": 0.0,
        "encoder_learning_rate": 0.0,
    }
    tx = optim.make_optimizer(fields, learning_rate)
    semi = method == "semi"
    settings = recipe(method, 0.5, ramp_steps=2, confidence=0.5) if semi else recipe(method)
    step = partial(
        steps.train_step,
        objective=partial(objective.objective, model=network, recipe=settings),
        optimizer=tx,
        accumulate=accumulate,
        ema_decay=0.9 if semi else 0.0,
        axis_name=axis_name,
        num_shards=num_shards,
    )
    variables = jax.tree.map(lambda x: x.astype(dtype), init(network))
    initial = state.create(variables, tx, average=semi)
    return step, initial, batch(size, labelled=size // 2 if semi else None), jax.random.key(1)
