"""A toy train step with arrays large enough to be cut, and runs of it on the devices there are."""

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
# Momentum: the state of the optimiser is as large as the parameters.
OPTIMIZERS = {"sgd": optax.sgd(0.1, momentum=0.9), "adamw": optax.adamw(1e-2)}


class Run(NamedTuple):
    """How the steps are taken."""

    mode: str = "pmap"
    shard: str = ""
    optimizer: str = "sgd"
    accumulate: int = 1
    members: int = 1
    num_at_once: int = 1


class Left(NamedTuple):
    """What a run left.

    Attributes:
      arrays: state, metrics and evaluation, on the host.
      traces: how often the step was traced.
      deleted: whether the first step took the buffers of its state.
      before, after: the state, with each array's shape on a device in its place.
      rows: of a batch, on each device.
    """

    arrays: Any
    traces: int
    deleted: bool
    before: Any
    after: Any
    rows: Any


PMAP, MESH = ("pmap", ""), ("mesh", "all")
WHERE = [PMAP, ("mesh", ""), ("mesh", "optimizer"), MESH]
RUNS = [
    *(Run(*where) for where in WHERE),
    *(Run(*where, optimizer="adamw") for where in (PMAP, *WHERE[2:])),
    *(Run(*where, accumulate=2) for where in (PMAP, MESH)),
    *(Run(*where, members=2) for where in (PMAP, MESH)),
    Run(*MESH, num_at_once=STEPS),
]


def name_of(run):
    """A run in the name of its test."""
    return "-".join(str(value) for value in run if value)


def objective(params, state, batch, keys, axis_name=None):
    """A regression with noise by each row's key, over features freed of the batch's mean."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (6,)))(keys)
    hidden = jnp.tanh((batch["x"] + noise) @ params["w"])
    mean = hidden.mean(0)
    if axis_name is not None:
        mean = jax.lax.pmean(mean, axis_name)
    value = jnp.square((hidden - mean) @ params["u"] + params["b"] - 1).mean(-1)
    value += jnp.square(params["odd"]).mean()
    return value.mean(), ({"mean": 0.5 * state.batch_stats["mean"] + mean}, {"loss": value})


def evaluate(variables, batch, axis_name=None):
    """A sum over the batch."""
    total = jnp.square(batch["x"] @ variables["params"]["w"]).sum()
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def initial(seed, optimizer):
    """A state of which `w` and `u` can be cut by four, `b` is small, and `odd` does not divide."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (6, 1024), "u": (1024, 8), "b": (8,), "odd": (129, 33)}
    params = {k: jnp.asarray(0.1 * rng.standard_normal(v), jnp.float32) for k, v in shapes.items()}
    variables = {"params": params, "batch_stats": {"mean": jnp.zeros(1024)}}
    return train_state.create(variables, optimizer)


def train_step(run, traces):
    """The step of a run, and some in one program; both tell `traces` when they are traced."""
    axis_name = distributed.axis_name_of(run.mode)
    step = partial(
        steps.train_step,
        objective=partial(objective, axis_name=axis_name),
        optimizer=OPTIMIZERS[run.optimizer],
        accumulate=run.accumulate,
        axis_name=axis_name,
        shares=distributed.num_shards_of(run.mode),
    )
    step = steps.ensemble_step(step) if run.members > 1 else step

    def traced(function, *args):
        traces.append(function)
        return function(*args)

    return partial(traced, step), partial(traced, steps.multi_step(step, STEPS))


def first_state(run):
    """The state and the key that a run begins with; of its members, where there are some."""
    states = [initial(seed, OPTIMIZERS[run.optimizer]) for seed in range(run.members)]
    keys = [jax.random.key(seed) for seed in range(run.members)]
    if run.members == 1:
        return states[0], keys[0]
    return train_state.stack(states), jnp.stack(keys)


def split():
    """Records for all steps of a run, as if they were pictures."""
    x = np.random.default_rng(5).standard_normal((STEPS * BATCH, 6)).astype(np.float32)
    return {"x": x, "mask": np.zeros((len(x), 1, 1, 1), np.uint8)}


def order():
    """Which records the steps of a run take, {name: (STEPS, BATCH)}."""
    index = np.arange(STEPS * BATCH, dtype=np.int32).reshape(STEPS, BATCH)
    return {"index": index, "row": index % BATCH, "labelled": np.ones(index.shape, bool)}


def batches(run):
    """The batches of those steps, with a leading axis of members, where there are some."""
    for rows in order()["index"]:
        batch = {"x": split()["x"][rows], "row": rows % BATCH}
        yield batch if run.members == 1 else {k: np.stack([v, v]) for k, v in batch.items()}


def take(run):
    """The steps of a run as `program` has them taken under a configuration, and an evaluation."""
    config = common.base()
    config.parallel.mode, config.parallel.shard = run.mode, run.shard
    config.ensemble = run.members
    state, key = first_state(run)
    key, traces, metrics = distributed.replicate(key), [], []
    evaluation = partial(evaluate, axis_name=distributed.axis_name_of(run.mode))
    on = program.compile_steps(config, state, *train_step(run, traces), evaluation)
    first = state = on["place"](state)
    before = lying(first)
    if run.num_at_once > 1:
        rows, data = on["shard"](order(), axis=1), distributed.replicate(split())
        state, stacked = on["train_steps"](state, data, rows, np.int32(STEPS), key)
        metrics = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(STEPS)]
    for batch in batches(run) if run.num_at_once == 1 else ():
        sharded = on["shard"](batch, axis=int(run.members > 1))
        state, found = jax.block_until_ready(on["train_step"](state, sharded, key))
        metrics.append(found)
    sharded = on["shard"](next(batches(run._replace(members=1))))
    evaluated = on["eval_step"]({"params": state.params}, sharded) if run.members == 1 else None
    return Left(
        arrays=distributed.to_host({"state": state, "metrics": metrics, "evaluated": evaluated}),
        traces=len(traces),
        deleted=all(x.is_deleted() for x in jax.tree.leaves(first)),
        before=before,
        after=lying(state),
        rows=rows_of(sharded["row"]),
    )


def rows_of(x):
    """The rows on each device, of a batch cut by `parallel.shard` or `parallel.global_batch`."""
    if isinstance(x, np.ndarray):
        return x.tolist()
    return [part.data.tolist() for part in x.addressable_shards]


def lying(state):
    """The shapes in which the state's arrays lie on a device."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data.shape, state)


def main(path):
    """Takes all `RUNS`, and writes what they left."""
    Path(path).write_bytes(pickle.dumps({run: take(run) for run in RUNS}))
