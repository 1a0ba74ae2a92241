"""The only place that knows of devices and processes: pmap, placement, gathering."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from biclip_jax.errors import UserError

AXIS = "batch"
PLAIN = ("BICLIP_COORDINATOR", "BICLIP_NUM_PROCESSES", "BICLIP_PROCESS_ID")
DAY = 24 * 3600  # seconds


def initialize(environment: Mapping[str, str]) -> None:
    """Joins the other processes of a run, where the environment tells of any.

    Args:
      environment: BICLIP_COORDINATOR (host:port), BICLIP_NUM_PROCESSES and BICLIP_PROCESS_ID; or
        SLURM's variables, for more than one task; or BICLIP_DISTRIBUTED=auto for what jax finds by
        itself, such as a TPU pod. BICLIP_DISTRIBUTED=off: none of them.

    Raises:
      UserError: some of the three are missing or no numbers, or the others were not met.
    """
    wanted = environment.get("BICLIP_DISTRIBUTED", "")
    if wanted not in ("", "auto", "off"):
        raise UserError(f"BICLIP_DISTRIBUTED: {wanted!r}; expected auto, off, or nothing")
    missing = [name for name in PLAIN if not environment.get(name)]
    slurm = "SLURM_JOB_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1"
    if wanted == "off" or not (wanted or slurm or len(missing) < len(PLAIN)):
        return
    arguments: dict[str, Any] = {}
    if 0 < len(missing) < len(PLAIN):
        raise UserError(f"{', '.join(missing)}: not set; expected all of {', '.join(PLAIN)}")
    if not missing:
        address, count, index = (environment[name] for name in PLAIN)
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise UserError(
                f"BICLIP_PROCESS_ID: {index!r} of BICLIP_NUM_PROCESSES {count!r}; expected "
                "numbers, the first below the second"
            )
        arguments = {"coordinator_address": address, "num_processes": int(count)}
        arguments["process_id"] = int(index)
    try:
        # The others wait at their end while the first process tests the model.
        jax.distributed.initialize(**arguments, shutdown_timeout_seconds=DAY)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes of this run did not meet ({reason}); check that all were started and "
            "that the coordinator's address is reached from each, or set BICLIP_DISTRIBUTED=off"
        ) from error


def leads() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_writes(workdir: Path) -> Iterator[Path]:
    """The work directory for the first process; for others a scratch folder, and silence."""
    if leads():
        yield workdir
        return
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield Path(scratch)


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """One of several processes that fails ends without its exit's wait for the others.

    They would wait in turn for its part of the next step. Ending at once breaks their
    connection: they come here, too, or jax ends them (SIGABRT) when the heartbeats stay away.
    Exit status 2 after a `UserError`, otherwise 1.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        status = 2 if isinstance(error, UserError) else 1
        print(_last_words(error), file=sys.stderr, flush=True)
        os._exit(status)


def _last_words(error: Exception) -> str:
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, jax.errors.JaxRuntimeError):
        return (
            f"error: process {jax.process_index()} of {jax.process_count()} lost the others "
            f"({str(error).splitlines()[0]}); start all of them again: the run goes on from its "
            "last checkpoint"
        )
    return "".join(traceback.format_exception(error))


def of_first(tree: Any, facts: Any) -> tuple[Any, Any]:
    """What the first process holds, for all of them: a tree of host arrays, and JSON values."""
    if jax.process_count() == 1:
        return tree, facts
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    tree = multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, tree))
    return jax.tree.map(np.asarray, tree), json.loads(np.asarray(text).tobytes())


def agreed(number: int | None, ask: bool) -> int | None:
    """A signal's number that any process received, the same in all; None: none.

    Args:
      number: that this one received.
      ask: whether to ask the others now, which all must do together.
    """
    if jax.process_count() == 1:
        return number
    if not ask:
        return None
    found = multihost_utils.process_allgather(np.int32(number or 0))
    return int(found.max()) or None


def meet() -> None:
    """Waits until all processes are here: one that leaves earlier may have the others ended."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("meet")


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """A tree of host or device arrays, whole on every device, of all processes or of those given.

    A step's output lies so, too: the first call then compiles for all later ones.
    """
    mesh = Mesh(np.array(devices or jax.devices()), (AXIS,))
    whole = NamedSharding(mesh, PartitionSpec())
    if whole.is_fully_addressable:
        # A copy: a step that donates its state must not delete the caller's.
        return jax.device_put(tree, whole, may_alias=False)
    return jax.tree.map(partial(_place, sharding=whole), tree)


def _place(x: Any, sharding: NamedSharding) -> jax.Array:
    """One array, the same in every process, on devices of all of them."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(x), sharding))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def pmap_train_step(step: Callable) -> Callable:
    """(state, sharded batch, key) -> (state, metrics).

    The state is donated and has no device axis, neither going in nor coming out.
    State, key and batch may have a leading axis of members, see `steps.in_turn`.
    """
    return jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=(0,)
    )


def pmap_eval_step(step: Callable) -> Callable:
    """(variables, sharded batch) -> one result summed over the devices by the step itself."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None)


def pmap_predict_step(step: Callable) -> Callable:
    """(variables, host batch) -> (B, ...) host array; pads B to the number of devices.

    On this process's devices alone: any of several may predict by itself.
    """
    local = jax.local_devices()
    mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=0, devices=local)

    def predict(variables: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        size = next(iter(batch.values())).shape[0]
        missing = -size % jax.local_device_count()
        padded = {k: np.concatenate([v, v[:1].repeat(missing, 0)]) for k, v in batch.items()}
        out = np.asarray(mapped(variables, shard(padded)))
        return out.reshape(-1, *out.shape[2:])[:size]

    return predict


def shard(batch: Mapping[str, Any], axis: int = 0) -> dict[str, np.ndarray]:
    """Rows (B, ...) to (devices, B / devices, ...).

    Args:
      batch: arrays of as many rows.
      axis: of the rows; what comes before it, members of an ensemble, follows the devices.

    Raises:
      ValueError: B is not a multiple of the number of local devices.
    """
    devices = jax.local_device_count()
    rows = next(iter(batch.values())).shape[axis]
    if rows % devices:
        raise ValueError(f"a batch of {rows} rows does not divide over {devices} devices")

    def cut(x: np.ndarray) -> np.ndarray:
        shape = (*x.shape[:axis], devices, rows // devices, *x.shape[axis + 1 :])
        return np.moveaxis(x.reshape(shape), axis, 0)

    return {name: cut(x) for name, x in batch.items()}


def num_devices() -> int:
    """Devices that share a batch."""
    return jax.device_count()


def check_batch_size(batch_size: int, accumulate: int) -> None:
    """Raises ValueError where a batch cannot be cut for the devices and for accumulation."""
    unit = jax.device_count() * accumulate
    if batch_size % unit:
        raise ValueError(
            f"batch_size is {batch_size}; expected a multiple of {unit}: "
            f"{jax.device_count()} devices x {accumulate} parts"
        )


def round_up(batch_size: int) -> int:
    """The next multiple of the number of local devices."""
    return batch_size + -batch_size % jax.local_device_count()


def to_host(tree: Any) -> Any:
    """Numpy copies of a replicated tree; safe to keep while the state is donated on."""
    return jax.tree.map(np.array, tree)
