"""The train step: a pure function that depends on an axis name, not on devices."""

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
    """Derives one key per example from stream, step and row in the global batch.

    The keys do not depend on the number of devices.
    """
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
    num_shards: int = 1,
) -> tuple[TrainState, dict[str, tuple[Array, Array]]]:
    """Takes one optimisation step.

    If the loss or a gradient is not finite, the parameters, statistics and optimiser state do not
    change; `skipped` counts the step.

    Args:
      state: State before the step.
      batch: This device's shard of the global batch; B divisible by `accumulate`.
      key: Key of the augmentation stream, the same in every step.
      objective: Loss function with everything but data and parameters bound.
      optimizer: Optimiser that `state.opt_state` belongs to.
      accumulate: Number of sequential microbatches over which the gradient is averaged.
      ema_decay: Decay of the moving averages, if the state keeps them; early steps use a smaller
        one, min(decay, (1 + step) / (10 + step)).
      average_statistics: False if the objective's batch statistics already are those of the
        averaged parameters.
      axis_name: Device axis; None runs the global batch under plain jit.
      num_shards: Number of devices whose rows the batch concatenates. A microbatch takes rows
        of each, the same rows as with an axis name.

    Returns:
      The state after the step, and {name: (sum, count)} over the global batch.
    """
    keys = example_keys(key, state.step, batch["row"])
    grads, batch_stats, values = _gradient(state, batch, keys, objective, accumulate, num_shards)
    metrics = {name: (value.sum(), jnp.float32(value.size)) for name, value in values.items()}
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
        metrics = jax.lax.psum(metrics, axis_name)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updated = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    if state.ema is not None:
        updated = dataclasses.replace(updated, ema=_average(updated, ema_decay, average_statistics))
    new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    new_state = dataclasses.replace(
        new_state, step=state.step + 1, skipped=state.skipped + (1 - finite.astype(jnp.int32))
    )
    one = jnp.float32(1)
    metrics |= {"grad_norm": (norm, one), "skipped": (one - finite, one)}
    return new_state, metrics


def ensemble_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a train step into an ensemble step; the state and all arguments get a member axis.

    The members run sequentially within one program, in an unrolled loop. `vmap` would turn their
    convolutions into grouped convolutions, and on CPU a rolled loop runs convolutions on one core;
    both are slow (benchmarks/ensemble.py). Metrics are summed over the members.
    """

    def step_members(
        states: TrainState, batches: Any, keys: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        def step_member(carry: None, member: Any) -> tuple[None, Any]:
            return carry, step(*member)

        _, (states, metrics) = jax.lax.scan(step_member, None, (states, batches, keys), unroll=True)
        return states, jax.tree.map(lambda x: x.sum(0), metrics)

    return step_members


def gather_batch(data: Mapping[str, Array], rows: Mapping[str, Array]) -> dict[str, Array]:
    """Gathers a batch from a split that is on the device.

    Args:
      data: Images, masks and text inputs of all records, (N, ...) each.
      rows: index, row and labelled, (B,) each, or (K, B) for K members.

    Returns:
      The batch, with the fields row and labelled.
    """
    batch = {name: values[rows["index"]] for name, values in data.items()}
    return {**batch, "row": rows["row"], "labelled": rows["labelled"]}


def multi_step(step: Callable[..., Any], length: int) -> Callable[..., Any]:
    """Combines several steps into one program, over a split that is on the device.

    Args:
      step: (state, batch, key) -> (state, metrics).
      length: Largest number of steps.

    Returns:
      (state, data, rows, count, key) -> (state, metrics): rows and metrics have a leading axis of
      size `length`, of which the first `count` entries are used; data as for `gather_batch`.
    """

    def gather_and_step(state: Any, data: Any, rows: Any, key: Any) -> tuple[Any, Any]:
        return step(state, gather_batch(data, rows), key)

    def single(state: Any, data: Any, rows: Any, count: Any, key: Any) -> tuple[Any, Any]:
        state, metrics = gather_and_step(state, data, jax.tree.map(lambda x: x[0], rows), key)
        return state, jax.tree.map(lambda x: x[None], metrics)

    def loop(state: Any, data: Any, rows: Any, count: Any, key: Any) -> tuple[Any, Any]:
        def body(i: Any, carry: Any) -> Any:
            state, metrics = carry
            state, new = gather_and_step(state, data, jax.tree.map(lambda x: x[i], rows), key)
            return state, jax.tree.map(lambda all_, x: all_.at[i].set(x), metrics, new)

        first = jax.tree.map(lambda x: x[0], rows)
        shapes = jax.eval_shape(gather_and_step, state, data, first, key)[1]
        metrics = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, metrics))

    # On CPU, XLA runs the convolutions of a loop on one core.
    return single if length == 1 else loop


def mean_metrics(
    window: Sequence[Mapping[str, tuple[Any, Any]]],
) -> dict[str, float | int]:
    """Averages the (sum, count) metrics of several steps, on the host.

    `skipped` is the number of skipped steps; their other values are ignored.
    """
    finite = [metrics for metrics in window if not metrics["skipped"][0]]
    names = [name for name in window[0] if name != "skipped"]
    means: dict[str, float | int] = {
        name: sum(float(m[name][0]) for m in finite) / sum(float(m[name][1]) for m in finite)
        for name in names
        if finite
    }
    return {**means, "skipped": len(window) - len(finite)}


def _average(state, decay, statistics):
    """Updates the moving averages; BatchNorm's statistics are averaged like the parameters."""
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    latest = {"params": state.params, "batch_stats": state.batch_stats}
    averaged = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, latest)
    return averaged if statistics else {**averaged, "batch_stats": state.batch_stats}


def _gradient(state, batch, keys, objective, accumulate, num_shards):
    """Returns gradient, statistics and per-example values, over `accumulate` microbatches."""
    gradient = jax.value_and_grad(objective, has_aux=True)
    if accumulate == 1:
        (_, (batch_stats, values)), grads = gradient(state.params, state, batch, keys)
        return grads, batch_stats, values

    def split(x):
        parts = x.reshape(num_shards, accumulate, -1, *x.shape[1:]).swapaxes(0, 1)
        return parts.reshape(accumulate, -1, *x.shape[1:])

    def accumulate_part(carry, inputs):
        batch_stats, total = carry
        part_state = dataclasses.replace(state, batch_stats=batch_stats)
        (_, (batch_stats, values)), grads = gradient(state.params, part_state, *inputs)
        return (batch_stats, jax.tree.map(jnp.add, total, grads)), values

    start = (state.batch_stats, jax.tree.map(jnp.zeros_like, state.params))
    parts = (jax.tree.map(split, dict(batch)), split(keys))
    (batch_stats, total), values = jax.lax.scan(accumulate_part, start, parts)
    grads = jax.tree.map(lambda g: g / accumulate, total)
    return grads, batch_stats, jax.tree.map(jnp.ravel, values)
