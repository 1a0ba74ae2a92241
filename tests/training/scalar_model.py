"""The BiCLIP objective with a few numbers as the model, so that tests can compute the results."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from biclip_jax.models.biclip import Fused, Segmented
from biclip_jax.training import state as train_state
from biclip_jax.training import views
from biclip_jax.training.objectives import biclip as objective

SIZE, NUM, TEXT = 8, 4, 5
IDENTITY = views.Geometry(0.0, 0.0, 0.0)
PARTS = {"gen": 0.3, "iac": 0.5, "cycle": 0.7, "pseudo_labels": 1.1, "mean_teacher": 1.3}


class Plain:
    """A model with a few scalar parameters."""

    fuse, training_pass = "fuse", "training_pass"

    def __init__(self):
        self.num_passes = 0

    def apply(self, variables, first, *, method, mutable=(), train=False, **text):
        params = variables["params"]
        if method == self.fuse:
            t = params["text"] * text["text_features"]
            if "has_text" in text:
                t = jnp.where(text["has_text"][:, None], t, params["empty"])
            pseudo = jax.nn.sigmoid(params["pseudo"] * t.sum(-1))[:, None, None, None]
            pseudo = pseudo * jnp.ones((1, *first.shape[1:]))
            return Fused(t, t, pseudo, params["cycle"] * t if train else None)
        self.num_passes += 1
        seen = 10 * variables["batch_stats"]["seen"] + first.image.mean()
        return self.segment(params, first), {"batch_stats": {"seen": seen}}

    def segment(self, params, view):
        logits = params["image"] * (view.image + view.pseudo_image).mean(-1, keepdims=True)
        logits = logits + params["level"] * view.text.sum(-1)[:, None, None, None]
        moments = [logits.mean((1, 2, 3)), jnp.square(logits).mean((1, 2, 3)), view.text.sum(-1)]
        return Segmented(logits, {"decoder_0": jnp.stack(moments, -1)})


def plain_state(step=0, average=True, seed=0):
    rng = np.random.default_rng(seed)
    names = ("text", "empty", "pseudo", "cycle", "image", "level")
    params = {name: jnp.float32(rng.uniform(0.5, 1.5)) for name in names}
    variables = {"params": params, "batch_stats": {"seen": jnp.float32(0)}}
    state = train_state.create(variables, optax.sgd(1.0), average=average)
    return state.replace(step=jnp.int32(step))


def plain_batch(labelled=NUM, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (NUM, SIZE, SIZE, 1)).astype(np.uint8)
    is_labelled = np.arange(NUM) < labelled
    return {
        "image": jnp.asarray(image),
        "mask": jnp.asarray((image > 127) & is_labelled[:, None, None, None]).astype(jnp.uint8),
        "labelled": jnp.asarray(is_labelled),
        "text_features": jnp.asarray(rng.standard_normal((NUM, TEXT)), jnp.float32),
        "swapped_text_features": jnp.asarray(rng.standard_normal((NUM, TEXT)), jnp.float32),
        "has_text": jnp.ones(NUM, bool),
        "swapped_has_text": jnp.ones(NUM, bool),
    }


def recipe(weights=None, **changes):
    """Returns a recipe: both views learn, no geometry, CutMix as the only strong augmentation."""
    default = objective.Recipe(
        weights or {},
        geometry=IDENTITY,
        strong=views.Strong(photometric=False, cutmix=1.0),
        segment_strong=True,
        iac_learner="strong",
        cycle_distance="l2",
        labelled=0.5,
        confidence=0.5,
    )
    return default._replace(**changes)


def bind(recipe, state=None, batch=None, model=None):
    """Returns the objective and its arguments."""
    state = state or plain_state()
    batch = batch or plain_batch(round(NUM * recipe.labelled))
    keys = jax.random.split(jax.random.key(3), NUM)
    loss_fn = partial(objective.objective, model=model or Plain(), recipe=recipe)
    return loss_fn, (state.params, state, batch, keys)


def run(*args, **kwargs):
    """Returns loss, per-example values and gradients; not compiled, which would take longer."""
    loss_fn, inputs = bind(*args, **kwargs)
    (loss, (_, values)), grads = jax.value_and_grad(loss_fn, has_aux=True)(*inputs)
    return float(loss), {k: np.asarray(v) for k, v in values.items()}, grads


def values_of(*args, **kwargs):
    """Returns the per-example values."""
    loss_fn, inputs = bind(*args, **kwargs)
    return {name: np.asarray(value) for name, value in loss_fn(*inputs)[1][1].items()}


def names_of(*args, **kwargs):
    """Returns the names of the values without computing them."""
    loss_fn, inputs = bind(*args, **kwargs)
    return set(jax.eval_shape(loss_fn, *inputs)[1][1])


def strong_keys():
    """Returns the keys of the strong views in `run`."""
    keys = jax.random.split(jax.random.key(3), NUM)
    return jax.vmap(jax.random.split, out_axes=1)(keys)[1]


def boxes():
    """Returns the deformation (CutMix boxes) in `run`."""
    return views.random_deformation(strong_keys(), SIZE, SIZE, recipe().strong)
