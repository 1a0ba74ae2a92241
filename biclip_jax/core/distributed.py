"""Devices and processes: pmap, mesh, placement and gathering. No other module uses them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from biclip_jax.core.errors import UserError

AXIS = "batch"
MIN_SHARDED_SIZE = 4096  # elements; smaller arrays are replicated
PROCESS_VARIABLES = ("BICLIP_COORDINATOR", "BICLIP_NUM_PROCESSES", "BICLIP_PROCESS_ID")
DAY = 24 * 3600  # seconds


def initialize(environment: Mapping[str, str]) -> None:
    """Calls `jax.distributed.initialize` if the environment describes a multi-process run.

    Args:
      environment: BICLIP_COORDINATOR (host:port), BICLIP_NUM_PROCESSES and BICLIP_PROCESS_ID; or
        Slurm's variables, if there is more than one task; or BICLIP_DISTRIBUTED=auto for jax's own
        detection, for example on a TPU pod. BICLIP_DISTRIBUTED=off disables all of them.

    Raises:
      UserError: Some of the three variables are missing or invalid, or the processes did not
        connect.
    """
    mode = environment.get("BICLIP_DISTRIBUTED", "")
    if mode not in ("", "auto", "off"):
        raise UserError(f"BICLIP_DISTRIBUTED: {mode!r}; expected auto, off or unset")
    missing = [name for name in PROCESS_VARIABLES if not environment.get(name)]
    slurm = "SLURM_JOB_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1"
    if mode == "off" or not (mode or slurm or len(missing) < len(PROCESS_VARIABLES)):
        return
    arguments: dict[str, Any] = {}
    if 0 < len(missing) < len(PROCESS_VARIABLES):
        raise UserError(
            f"{', '.join(missing)}: not set; expected all of {', '.join(PROCESS_VARIABLES)}"
        )
    if not missing:
        address, count, index = (environment[name] for name in PROCESS_VARIABLES)
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise UserError(
                f"BICLIP_PROCESS_ID: {index!r} of BICLIP_NUM_PROCESSES {count!r}; expected "
                "integers, the first less than the second"
            )
        arguments = {"coordinator_address": address, "num_processes": int(count)}
        arguments["process_id"] = int(index)
    try:
        # The other processes wait at their end while process 0 tests the model.
        jax.distributed.initialize(**arguments, shutdown_timeout_seconds=DAY)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes of this run did not connect ({reason}); check that all were started "
            "and that each can reach the coordinator's address, or set BICLIP_DISTRIBUTED=off"
        ) from error


def is_main_process() -> bool:
    """Returns True on process 0, which alone writes files and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def only_main_writes(workdir: Path) -> Iterator[Path]:
    """Yields `workdir` on process 0; others get a scratch folder and print nothing."""
    if is_main_process():
        yield workdir
        return
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stdout(devnull),
    ):
        yield Path(scratch)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Exits immediately if one of several processes fails, without waiting for the others.

    The other processes would otherwise wait for this one in the next step. An immediate exit breaks
    their connection: they fail here too, or jax aborts them (SIGABRT) when the heartbeats stop.
    Exit status 2 after a `UserError`, otherwise 1. Does nothing in a single-process run.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        status = 2 if isinstance(error, UserError) else 1
        print(_error_text(error), file=sys.stderr, flush=True)
        os._exit(status)


def _error_text(error: Exception) -> str:
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, jax.errors.JaxRuntimeError):
        return (
            f"error: process {jax.process_index()} of {jax.process_count()} lost its connection to "
            f"the others ({str(error).splitlines()[0]}); start all of them again: the run resumes "
            "from its last checkpoint"
        )
    return "".join(traceback.format_exception(error))


def broadcast_from_main(tree: Any, facts: Any) -> tuple[Any, Any]:
    """Broadcasts a tree of host arrays and JSON values from process 0 to all processes."""
    if jax.process_count() == 1:
        return tree, facts
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    tree = multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, tree))
    return jax.tree.map(np.asarray, tree), json.loads(np.asarray(text).tobytes())


def agree_on_signal(number: int | None, communicate: bool) -> int | None:
    """Returns the signal that any process received, the same on all processes, or None.

    Args:
      number: The signal that this process received, or None.
      communicate: Whether to communicate now; every process must pass the same value.
    """
    if jax.process_count() == 1:
        return number
    if not communicate:
        return None
    numbers = multihost_utils.process_allgather(np.int32(number or 0))
    return int(numbers.max()) or None


def barrier() -> None:
    """Barrier across processes: a process that exits early can abort the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("barrier")


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Replicates a tree of host or device arrays on `devices`; None for those of all processes.

    The output of a step has the same sharding, so that the step compiles only once.
    """
    return put(tree, replicated(tree, devices))


def replicate_locally(tree: Any) -> Any:
    """Replicates a tree on the devices of this process only."""
    return replicate(tree, jax.local_devices())


def put(tree: Any, shardings: Any) -> Any:
    """Places a tree of host or device arrays on devices.

    Args:
      tree: Full arrays, the same in every process.
      shardings: A tree of the same structure; see `replicated` and `sharded`.
    """
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        # A copy: a step that donates its state must not delete the caller's.
        return jax.device_put(tree, shardings, may_alias=False)
    return jax.tree.map(_put, tree, shardings)


def replicated(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Returns shardings that replicate every array of a tree."""
    sharding = _sharding(PartitionSpec(), devices)
    return jax.tree.map(lambda _: sharding, tree)


def sharded(tree: Any) -> Any:
    """Returns shardings that split every array over all devices, see `partition_spec`."""
    return jax.tree.map(lambda x: _sharding(partition_spec(x.shape, jax.device_count())), tree)


def partition_spec(shape: Sequence[int], devices: int) -> PartitionSpec:
    """Splits an array along its first axis that is divisible by the number of devices.

    Small arrays, and arrays without such an axis, are replicated.
    """
    axes = [axis for axis, size in enumerate(shape) if size % devices == 0]
    if math.prod(shape) < MIN_SHARDED_SIZE or not axes:
        return PartitionSpec()
    return _along(axes[0])


def _along(axis: int) -> PartitionSpec:
    return PartitionSpec(*[None] * axis, AXIS)


def _sharding(spec: PartitionSpec, devices: Sequence[jax.Device] | None = None) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices or jax.devices()), (AXIS,)), spec)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """Places one array, the same in every process, on the devices of all processes."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def pmap_train_step(step: Callable) -> Callable:
    """Maps a train step: (state, sharded batch, key) -> (state, metrics).

    The state is donated and has no device axis, as input or output. State, key and batch may have a
    leading axis of ensemble members, see `steps.ensemble_step`.
    """
    return jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=(0,)
    )


def pmap_train_steps(steps: Callable) -> Callable:
    """Maps several steps: (state, data, sharded rows, count, key) -> (state, metrics).

    See `steps.multi_step` and `pmap_train_step`; the data are replicated.
    """
    axes = (None, None, 0, None, None)
    return jax.pmap(steps, axis_name=AXIS, in_axes=axes, out_axes=None, donate_argnums=(0,))


def pmap_eval_step(step: Callable) -> Callable:
    """Maps (variables, sharded batch) -> result; the step itself sums over the devices."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None)


def mesh_train_step(step: Callable, shardings: Any, rows_axis: int = 0) -> Callable:
    """Compiles (state, global batch, key) -> (state, metrics) by jit over a mesh of all devices.

    The compiler partitions the program by the shardings of its arguments, so `step` has no axis
    name and sees the global batch. The state is donated and keeps its shardings.

    Args:
      step: (state, batch, key) -> (state, metrics).
      shardings: Shardings of the state; see `replicated` and `sharded`.
      rows_axis: Batch axis of the batch's arrays, see `global_batch`.
    """
    plain, rows = _sharding(PartitionSpec()), _sharding(_along(rows_axis))
    inputs = (shardings, rows, plain)
    return jax.jit(step, in_shardings=inputs, out_shardings=(shardings, plain), donate_argnums=(0,))


def mesh_train_steps(steps: Callable, shardings: Any, rows_axis: int) -> Callable:
    """Compiles several steps: (state, data, rows, count, key) -> (state, metrics).

    See `steps.multi_step` and `mesh_train_step`; the data are replicated.
    """
    plain, rows = _sharding(PartitionSpec()), _sharding(_along(rows_axis))
    inputs = (shardings, plain, rows, plain, plain)
    return jax.jit(
        steps, in_shardings=inputs, out_shardings=(shardings, plain), donate_argnums=(0,)
    )


def mesh_eval_step(step: Callable) -> Callable:
    """Compiles (variables, global batch) -> one result; variables keep their shardings."""
    shardings = (None, _sharding(_along(0)))
    return jax.jit(step, in_shardings=shardings, out_shardings=_sharding(PartitionSpec()))


def pmap_predict_step(step: Callable) -> Callable:
    """Maps (variables, host batch) -> host array (B, ...); pads B to the number of devices.

    Uses the devices of this process only, so that any process can predict independently.
    """
    local = jax.local_devices()
    mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=0, devices=local)

    def predict(variables: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        size = next(iter(batch.values())).shape[0]
        missing = -size % jax.local_device_count()
        padded = {k: np.concatenate([v, v[:1].repeat(missing, 0)]) for k, v in batch.items()}
        out = np.asarray(mapped(variables, shard_batch(padded)))
        return out.reshape(-1, *out.shape[2:])[:size]

    return predict


def shard_batch(batch: Mapping[str, Any], axis: int = 0) -> dict[str, np.ndarray]:
    """Reshapes rows (B, ...) to (devices, B / devices, ...).

    Args:
      batch: Arrays with the same number of rows.
      axis: Axis of the rows. Axes before it (ensemble members) follow the device axis.

    Raises:
      ValueError: B is not a multiple of the number of local devices.
    """
    devices, rows = jax.local_device_count(), _local_rows(batch, axis)

    def split(x: np.ndarray) -> np.ndarray:
        shape = (*x.shape[:axis], devices, rows // devices, *x.shape[axis + 1 :])
        return np.moveaxis(x.reshape(shape), axis, 0)

    return {name: split(x) for name, x in batch.items()}


def free_bytes() -> int | None:
    """Returns the free memory of this process's first device, None if it is not reported."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def global_batch(batch: Mapping[str, Any], axis: int = 0) -> dict[str, jax.Array]:
    """Places this process's rows (B, ...) on its devices, as its part of the global batch.

    Args:
      batch: Arrays with the same number of rows.
      axis: Axis of the rows. Axes before it are ensemble members.

    Raises:
      ValueError: B is not a multiple of the number of local devices.
    """
    _local_rows(batch, axis)
    sharding = _sharding(_along(axis))
    host = {name: np.asarray(x) for name, x in batch.items()}
    return jax.make_array_from_process_local_data(sharding, host)


def _local_rows(batch: Mapping[str, Any], axis: int) -> int:
    devices = jax.local_device_count()
    rows = next(iter(batch.values())).shape[axis]
    if rows % devices:
        raise ValueError(f"batch of {rows} rows is not divisible by {devices} devices")
    return rows


def process_shard() -> dict[str, int]:
    """Returns process_index and process_count, which select this process's rows of a batch."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def num_devices() -> int:
    """Returns the number of devices that share a batch."""
    return jax.device_count()


def axis_name_of(mode: str) -> str | None:
    """Returns the axis name of a step; None for parallel.mode=mesh, see `mesh_train_step`."""
    return AXIS if mode == "pmap" else None


def num_shards_of(mode: str) -> int:
    """Returns the number of devices whose rows a step sees: 1 for pmap, all for mesh."""
    return 1 if mode == "pmap" else jax.device_count()


def check_batch_size(batch_size: int, accumulate: int) -> None:
    """Raises ValueError if the batch size is not divisible by devices x accumulated parts."""
    unit = jax.device_count() * accumulate
    if batch_size % unit:
        raise ValueError(
            f"batch_size is {batch_size}; expected a multiple of {unit}: "
            f"{jax.device_count()} devices x {accumulate} parts"
        )


def round_up_to_devices(batch_size: int) -> int:
    """Rounds up to a multiple of the number of local devices."""
    return batch_size + -batch_size % jax.local_device_count()


def to_host(tree: Any) -> Any:
    """Copies a tree to full NumPy arrays, safe to keep after the state is donated.

    All processes must call it, since arrays may be split over them.
    """
    return jax.tree.map(_to_host, tree)


def _to_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.array(x)
