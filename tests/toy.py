"""A toy train step with arrays large enough to be sharded, and runs of it on the local devices."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from biclip_jax.configs import common
from biclip_jax.core import distributed
from biclip_jax.experiment import program
from biclip_jax.training import state as train_state
from biclip_jax.training import steps

BATCH, STEPS = 16, 3
# With momentum the optimiser state is as large as the parameters.
OPTIMIZERS = {"sgd": optax.sgd(0.1, momentum=0.9), "adamw": optax.adamw(1e-2)}


class Run(NamedTuple):
    """Settings of a run."""

    mode: str = "pmap"
    shard: str = ""
    optimizer: str = "sgd"
    accumulate: int = 1
    members: int = 1
    num_at_once: int = 1


class RunResult(NamedTuple):
    """Results of a run.

    Attributes:
      arrays: State, metrics and evaluation, on the host.
      traces: Number of times the step was traced.
      deleted: Whether the first step deleted the buffers of its state (donation).
      before, after: Tree of the per-device shapes of the state's arrays.
      rows: Rows of a batch on each device.
    """

    arrays: Any
    traces: int
    deleted: bool
    before: Any
    after: Any
    rows: Any


PMAP, MESH = ("pmap", ""), ("mesh", "all")
LAYOUTS = [PMAP, ("mesh", ""), ("mesh", "optimizer"), MESH]
RUNS = [
    *(Run(*layout) for layout in LAYOUTS),
    *(Run(*layout, optimizer="adamw") for layout in (PMAP, *LAYOUTS[2:])),
    *(Run(*layout, accumulate=2) for layout in (PMAP, MESH)),
    *(Run(*layout, members=2) for layout in (PMAP, MESH)),
    Run(*MESH, num_at_once=STEPS),
]


def name_of(run):
    """Returns the test id of a run."""
    return "-".join(str(value) for value in run if value)


def objective(params, state, batch, keys, axis_name=None):
    """A regression with per-row noise on features from which the batch mean is subtracted."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (6,)))(keys)
    hidden = jnp.tanh((batch["x"] + noise) @ params["w"])
    mean = hidden.mean(0)
    if axis_name is not None:
        mean = jax.lax.pmean(mean, axis_name)
    value = jnp.square((hidden - mean) @ params["u"] + params["b"] - 1).mean(-1)
    value += jnp.square(params["odd"]).mean()
    return value.mean(), ({"mean": 0.5 * state.batch_stats["mean"] + mean}, {"loss": value})


def evaluate(variables, batch, axis_name=None):
    """Computes a sum over the batch."""
    total = jnp.square(batch["x"] @ variables["params"]["w"]).sum()
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def initial(seed, optimizer):
    """Returns a state: `w` and `u` divide into four shards, `b` is small, `odd` does not divide."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (6, 1024), "u": (1024, 8), "b": (8,), "odd": (129, 33)}
    params = {k: jnp.asarray(0.1 * rng.standard_normal(v), jnp.float32) for k, v in shapes.items()}
    variables = {"params": params, "batch_stats": {"mean": jnp.zeros(1024)}}
    return train_state.create(variables, optimizer)


def train_step(run, traces):
    """Returns the step of a run and its multi-step version; both record their traces."""
    axis_name = distributed.axis_name_of(run.mode)
    step = partial(
        steps.train_step,
        objective=partial(objective, axis_name=axis_name),
        optimizer=OPTIMIZERS[run.optimizer],
        accumulate=run.accumulate,
        axis_name=axis_name,
        num_shards=distributed.num_shards_of(run.mode),
    )
    step = steps.ensemble_step(step) if run.members > 1 else step

    def traced(function, *args):
        traces.append(function)
        return function(*args)

    return partial(traced, step), partial(traced, steps.multi_step(step, STEPS))


def first_state(run):
    """Returns the initial state and key of a run, stacked over the members of an ensemble."""
    states = [initial(seed, OPTIMIZERS[run.optimizer]) for seed in range(run.members)]
    keys = [jax.random.key(seed) for seed in range(run.members)]
    if run.members == 1:
        return states[0], keys[0]
    return train_state.stack(states), jnp.stack(keys)


def split():
    """Returns the records for all steps of a run."""
    x = np.random.default_rng(5).standard_normal((STEPS * BATCH, 6)).astype(np.float32)
    return {"x": x, "mask": np.zeros((len(x), 1, 1, 1), np.uint8)}


def order():
    """Returns the records of each step of a run, {name: (STEPS, BATCH)}."""
    index = np.arange(STEPS * BATCH, dtype=np.int32).reshape(STEPS, BATCH)
    return {"index": index, "row": index % BATCH, "labelled": np.ones(index.shape, bool)}


def batches(run):
    """Yields the batches of a run, with a leading member axis for an ensemble."""
    for rows in order()["index"]:
        batch = {"x": split()["x"][rows], "row": rows % BATCH}
        yield batch if run.members == 1 else {k: np.stack([v, v]) for k, v in batch.items()}


def take(run):
    """Runs the steps as `program` compiles them for a config, and an evaluation."""
    config = common.base()
    config.parallel.mode, config.parallel.shard = run.mode, run.shard
    config.ensemble = run.members
    state, key = first_state(run)
    key, traces, metrics = distributed.replicate(key), [], []
    evaluation = partial(evaluate, axis_name=distributed.axis_name_of(run.mode))
    compiled = program.compile_steps(config, state, *train_step(run, traces), evaluation)
    first = state = compiled["place"](state)
    before = device_shapes(first)
    if run.num_at_once > 1:
        rows, data = compiled["shard"](order(), axis=1), distributed.replicate(split())
        state, stacked = compiled["train_steps"](state, data, rows, np.int32(STEPS), key)
        metrics = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(STEPS)]
    for batch in batches(run) if run.num_at_once == 1 else ():
        sharded = compiled["shard"](batch, axis=int(run.members > 1))
        state, values = jax.block_until_ready(compiled["train_step"](state, sharded, key))
        metrics.append(values)
    sharded, evaluated = compiled["shard"](next(batches(run._replace(members=1)))), None
    if run.members == 1:
        evaluated = compiled["eval_step"]({"params": state.params}, sharded)
    return RunResult(
        arrays=distributed.to_host({"state": state, "metrics": metrics, "evaluated": evaluated}),
        traces=len(traces),
        deleted=all(x.is_deleted() for x in jax.tree.leaves(first)),
        before=before,
        after=device_shapes(state),
        rows=rows_of(sharded["row"]),
    )


def rows_of(x):
    """Returns the rows on each device, of a batch sharded by `shard_batch` or `global_batch`."""
    if isinstance(x, np.ndarray):
        return x.tolist()
    return [part.data.tolist() for part in x.addressable_shards]


def device_shapes(state):
    """Returns the per-device shapes of the state's arrays."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data.shape, state)


def main(path):
    """Runs all `RUNS` and writes their results."""
    Path(path).write_bytes(pickle.dumps({run: take(run) for run in RUNS}))
