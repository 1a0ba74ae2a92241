"""The train step: pure; it knows an axis name and nothing of devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from biclip_jax.training.state import TrainState

# (params, state, batch, keys) -> (loss, (batch_stats, {name: value of each example}))
Objective = Callable[..., tuple[Array, tuple[Any, dict[str, Array]]]]


def example_keys(
    key: Key[Array, ""], step: Int[Array, ""], rows: Int[Array, " b"]
) -> Key[Array, " b"]:
    """One key an example, from (stream, step, row in the global batch), whatever the devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), rows)


def train_step(
    state: TrainState,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    average_statistics: bool = True,
    axis_name: str | None = None,
    shares: int = 1,
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
      ema_decay: of the moving averages, where the state keeps them; the first steps
        average over fewer, min(decay, (1 + step) / (10 + step)).
      average_statistics: false where the objective's batch statistics are those of the averaged
        parameters already.
      axis_name: device axis; None runs the global batch under plain jit.
      shares: devices whose rows lie in the batch one after the other: a part has some of each,
        the rows that it would have with an axis name.

    Returns:
      The state after, and {name: (sum, count)} over the global batch.
    """
    keys = example_keys(key, state.step, batch["row"])
    grads, batch_stats, values = _gradient(state, batch, keys, objective, accumulate, shares)
    metrics = {name: (value.sum(), jnp.float32(value.size)) for name, value in values.items()}
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
        metrics = jax.lax.psum(metrics, axis_name)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    moved = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    if state.ema is not None:
        moved = dataclasses.replace(moved, ema=_average(moved, ema_decay, average_statistics))
    new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
    new_state = dataclasses.replace(
        new_state, step=state.step + 1, skipped=state.skipped + (1 - finite.astype(jnp.int32))
    )
    one = jnp.float32(1)
    metrics |= {"grad_norm": (norm, one), "skipped": (one - finite, one)}
    return new_state, metrics


def ensemble_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step of an ensemble: every argument and the state have a leading axis of members.

    Members step in turn inside one program, written out one after the other: `vmap` makes
    grouped convolutions of theirs, and a loop runs them on one core of a CPU, both of which
    are slow (benchmarks/ensemble.py). Metrics are summed over the members.
    """

    def members(states: TrainState, batches: Any, keys: Any) -> tuple[TrainState, dict[str, Any]]:
        def one(carry: None, member: Any) -> tuple[None, Any]:
            return carry, step(*member)

        _, (states, metrics) = jax.lax.scan(one, None, (states, batches, keys), unroll=True)
        return states, jax.tree.map(lambda x: x.sum(0), metrics)

    return members


def gather_batch(data: Mapping[str, Array], rows: Mapping[str, Array]) -> dict[str, Array]:
    """The batch of some rows out of a whole split.

    Args:
      data: image, mask and sentences of all records, (N, ...) each.
      rows: index, row and labelled, (B,) each, or (K, B) for K members.
    """
    batch = {name: values[rows["index"]] for name, values in data.items()}
    return {**batch, "row": rows["row"], "labelled": rows["labelled"]}


def multi_step(step: Callable[..., Any], length: int) -> Callable[..., Any]:
    """Some steps as one program, over a split that lies on the device.

    Args:
      step: (state, batch, key) -> (state, metrics).
      length: largest number of steps.

    Returns:
      (state, data, rows, count, key) -> (state, metrics): rows and metrics have a leading
      axis of `length`, of which the first `count` are taken; data as for `gather_batch`.
    """

    def one(state: Any, data: Any, rows: Any, key: Any) -> tuple[Any, Any]:
        return step(state, gather_batch(data, rows), key)

    def single(state: Any, data: Any, rows: Any, count: Any, key: Any) -> tuple[Any, Any]:
        state, metrics = one(state, data, jax.tree.map(lambda x: x[0], rows), key)
        return state, jax.tree.map(lambda x: x[None], metrics)

    def loop(state: Any, data: Any, rows: Any, count: Any, key: Any) -> tuple[Any, Any]:
        def body(i: Any, carry: Any) -> Any:
            state, metrics = carry
            state, new = one(state, data, jax.tree.map(lambda x: x[i], rows), key)
            return state, jax.tree.map(lambda all_, x: all_.at[i].set(x), metrics, new)

        first = jax.tree.map(lambda x: x[0], rows)
        shapes = jax.eval_shape(one, state, data, first, key)[1]
        metrics = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, metrics))

    # A loop's convolutions run on one core of a CPU.
    return single if length == 1 else loop


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


def _average(state, decay, statistics):
    """The averages after a step; BatchNorm's statistics are averaged like the parameters."""
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    latest = {"params": state.params, "batch_stats": state.batch_stats}
    averaged = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, latest)
    return averaged if statistics else {**averaged, "batch_stats": state.batch_stats}


def _gradient(state, batch, keys, objective, accumulate, shares):
    """Gradient, statistics and per-example values, over `accumulate` parts in turn."""
    gradient = jax.value_and_grad(objective, has_aux=True)
    if accumulate == 1:
        (_, (batch_stats, values)), grads = gradient(state.params, state, batch, keys)
        return grads, batch_stats, values

    def split(x):
        parts = x.reshape(shares, accumulate, -1, *x.shape[1:]).swapaxes(0, 1)
        return parts.reshape(accumulate, -1, *x.shape[1:])

    def part(carry, inputs):
        batch_stats, total = carry
        before = dataclasses.replace(state, batch_stats=batch_stats)
        (_, (batch_stats, values)), grads = gradient(state.params, before, *inputs)
        return (batch_stats, jax.tree.map(jnp.add, total, grads)), values

    start = (state.batch_stats, jax.tree.map(jnp.zeros_like, state.params))
    parts = (jax.tree.map(split, dict(batch)), split(keys))
    (batch_stats, total), values = jax.lax.scan(part, start, parts)
    grads = jax.tree.map(lambda g: g / accumulate, total)
    return grads, batch_stats, jax.tree.map(jnp.ravel, values)
