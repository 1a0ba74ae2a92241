"""The train step: pure; it knows an axis name and nothing of devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from biclip_jax.models.biclip import BiCLIP, text_inputs, to_unit_rgb
from biclip_jax.training import losses, views
from biclip_jax.training.state import TrainState

# (params, batch_stats, batch, keys) -> (loss, (batch_stats, {name: value of each example}))
Objective = Callable[..., tuple[Array, tuple[Any, dict[str, Array]]]]


def example_keys(
    key: Key[Array, ""], step: Int[Array, ""], rows: Int[Array, " b"]
) -> Key[Array, " b"]:
    """One key an example, from (stream, step, row in the global batch), whatever the devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), rows)


def published_objective(
    params: Any,
    batch_stats: Any,
    batch: Mapping[str, Array],
    keys: Key[Array, " b"],
    *,
    model: BiCLIP,
    weights: Mapping[str, float],
    geometry: views.Geometry,
    double_sigmoid: bool = False,
) -> tuple[Float[Array, ""], tuple[Any, dict[str, Float[Array, " b"]]]]:
    """L = L_seg + w_gen L_gen + w_iac L_IAC + w_cycle L_cycle, meaned over the batch.

    The pseudo-image is made from the picture as it is and compared with it;
    the views come after, so that the sentence never meets a flipped picture.

    Args:
      params, batch_stats: of the model.
      batch: a `Batch`; B is this device's share.
      keys: (B,) one key an example.
      model: bound with `functools.partial`, like what follows.
      weights: {"gen": .1, "iac": .05, "cycle": .07} as published.
      geometry: of the joint augmentation.
      double_sigmoid: see `losses.segmentation_loss`.

    Returns:
      The loss, and (new batch statistics, {name: (B,) values}).
    """
    image, mask = to_unit_rgb(batch["image"]), batch["mask"].astype(jnp.float32)
    variables = {"params": params, "batch_stats": batch_stats}
    fused = model.apply(variables, image, **text_inputs(batch), train=True, method=model.fuse)
    view = jax.vmap(views.weak_and_strong, (0, 0, 0, 0, None))(
        keys, image, fused.pseudo_image, mask, geometry
    )
    # The strong view is only a target: no gradient, so no backward work through it.
    strong = (view.strong_image, jax.lax.stop_gradient(view.pseudo_image))
    out, updates = model.apply(
        variables,
        (view.weak_image, view.pseudo_image),
        strong,
        method=model.two_views,
        mutable=["batch_stats"],
    )
    parts = {
        "seg": losses.segmentation_loss(out.weak_logits, view.mask, double_sigmoid),
        "gen": losses.generator_loss(fused.pseudo_image, image, mask),
        "iac": losses.consistency_loss(out.weak_embedding, out.strong_embedding),
        "cycle": losses.cycle_loss(fused.text, fused.cycle_text),
    }
    total = parts["seg"] + sum(weights[name] * parts[name] for name in ("gen", "iac", "cycle"))
    values = {"loss": total, **{f"loss_{name}": part for name, part in parts.items()}}
    return total.mean(), (updates["batch_stats"], values)


def train_step(
    state: TrainState,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, tuple[Array, Array]]]:
    """One step of gradient descent.

    A loss or a gradient that is not finite leaves parameters, statistics and
    optimiser as they were; `skipped` counts it and the run's policy decides.

    Args:
      state: the state before.
      batch: this device's share of the global batch; B divisible by `accumulate`.
      key: of the augmentation stream, the same at every step.
      objective: the loss with everything but data and parameters bound.
      optimizer: the one whose state `state` holds.
      accumulate: the gradient is the mean over this many parts taken in turn.
      axis_name: device axis; None runs the global batch under plain jit.

    Returns:
      The state after, and {name: (sum, count)} over the global batch.
    """
    keys = example_keys(key, state.step, batch["row"])
    grads, batch_stats, values = _gradient(state, batch, keys, objective, accumulate)
    metrics = {name: (value.sum(), jnp.float32(value.size)) for name, value in values.items()}
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
        metrics = jax.lax.psum(metrics, axis_name)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    after = (optax.apply_updates(state.params, updates), batch_stats, opt_state)
    before = (state.params, state.batch_stats, state.opt_state)
    params, batch_stats, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), after, before
    )
    one = jnp.float32(1)
    metrics |= {"grad_norm": (norm, one), "skipped": (one - finite, one)}
    new_state = TrainState(
        state.step + 1,
        state.skipped + (1 - finite.astype(jnp.int32)),
        params,
        batch_stats,
        opt_state,
    )
    return new_state, metrics


def mean_metrics(
    window: Sequence[Mapping[str, tuple[Any, Any]]],
) -> dict[str, float | int]:
    """Means over some steps' (sum, count), on the host; `skipped` is a number of steps.

    Steps that were skipped tell nothing but that: their values are left out.
    """
    taken = [metrics for metrics in window if not metrics["skipped"][0]]
    names = [name for name in window[0] if name != "skipped"]
    means: dict[str, float | int] = {
        name: sum(float(m[name][0]) for m in taken) / sum(float(m[name][1]) for m in taken)
        for name in names
        if taken
    }
    return {**means, "skipped": len(window) - len(taken)}


def _gradient(state, batch, keys, objective, accumulate):
    """Gradient, statistics and per-example values, over `accumulate` parts in turn."""
    gradient = jax.value_and_grad(objective, has_aux=True)
    if accumulate == 1:
        (_, (batch_stats, values)), grads = gradient(state.params, state.batch_stats, batch, keys)
        return grads, batch_stats, values

    def split(x):
        return x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:])

    def part(carry, inputs):
        batch_stats, total = carry
        (_, (batch_stats, values)), grads = gradient(state.params, batch_stats, *inputs)
        return (batch_stats, jax.tree.map(jnp.add, total, grads)), values

    start = (state.batch_stats, jax.tree.map(jnp.zeros_like, state.params))
    parts = (jax.tree.map(split, dict(batch)), split(keys))
    (batch_stats, total), values = jax.lax.scan(part, start, parts)
    grads = jax.tree.map(lambda g: g / accumulate, total)
    return grads, batch_stats, jax.tree.map(jnp.ravel, values)
