"""The only place that knows of devices and processes: pmap, the mesh, placement, gathering."""

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
MIN_SHARDED_SIZE = 4096  # elements; an array with fewer is whole on every device
PROCESS_VARIABLES = ("BICLIP_COORDINATOR", "BICLIP_NUM_PROCESSES", "BICLIP_PROCESS_ID")
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
    missing = [name for name in PROCESS_VARIABLES if not environment.get(name)]
    slurm = "SLURM_JOB_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1"
    if wanted == "off" or not (wanted or slurm or len(missing) < len(PROCESS_VARIABLES)):
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


def is_main_process() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


@contextlib.contextmanager
def only_main_writes(workdir: Path) -> Iterator[Path]:
    """The work directory for the first process; for others a scratch folder, and silence."""
    if is_main_process():
        yield workdir
        return
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield Path(scratch)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
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
        print(_error_text(error), file=sys.stderr, flush=True)
        os._exit(status)


def _error_text(error: Exception) -> str:
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, jax.errors.JaxRuntimeError):
        return (
            f"error: process {jax.process_index()} of {jax.process_count()} lost the others "
            f"({str(error).splitlines()[0]}); start all of them again: the run goes on from its "
            "last checkpoint"
        )
    return "".join(traceback.format_exception(error))


def broadcast_from_main(tree: Any, facts: Any) -> tuple[Any, Any]:
    """What the first process holds, for all of them: a tree of host arrays, and JSON values."""
    if jax.process_count() == 1:
        return tree, facts
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    tree = multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, tree))
    return jax.tree.map(np.asarray, tree), json.loads(np.asarray(text).tobytes())


def any_process(number: int | None, ask: bool) -> int | None:
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


def barrier() -> None:
    """Waits until all processes are here: one that leaves earlier may have the others ended."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("meet")


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """A tree of host or device arrays, whole on every device, of all processes or of those given.

    A step's output lies so, too: the first call then compiles for all later ones.
    """
    return put(tree, replicated(tree, devices))


def replicate_locally(tree: Any) -> Any:
    """`replicate` on the devices of this process alone."""
    return replicate(tree, jax.local_devices())


def put(tree: Any, layout: Any) -> Any:
    """A tree of host or device arrays, the same in every process, on devices as `layout` says.

    Args:
      tree: whole arrays.
      layout: a tree like it, of shardings; see `replicated` and `sharded`.
    """
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(layout)):
        # A copy: a step that donates its state must not delete the caller's.
        return jax.device_put(tree, layout, may_alias=False)
    return jax.tree.map(_put, tree, layout)


def replicated(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """A layout: every array whole on every device."""
    sharding = _sharding(PartitionSpec(), devices)
    return jax.tree.map(lambda _: sharding, tree)


def sharded(tree: Any) -> Any:
    """A layout: every array cut over all devices as `partition_spec` says."""
    return jax.tree.map(lambda x: _sharding(partition_spec(x.shape, jax.device_count())), tree)


def partition_spec(shape: Sequence[int], devices: int) -> PartitionSpec:
    """Where an array is cut: along its first axis that divides by the number of devices.

    Small arrays, and those without such an axis, stay whole.
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
    """One array, the same in every process, on devices of all of them."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def pmap_train_step(step: Callable) -> Callable:
    """(state, sharded batch, key) -> (state, metrics).

    The state is donated and has no device axis, neither going in nor coming out.
    State, key and batch may have a leading axis of members, see `steps.ensemble_step`.
    """
    return jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=(0,)
    )


def pmap_train_steps(steps: Callable) -> Callable:
    """(state, data, sharded rows, count, key) -> (state, metrics), see `steps.multi_step`.

    As `pmap_train_step`; the data lie whole on every device.
    """
    axes = (None, None, 0, None, None)
    return jax.pmap(steps, axis_name=AXIS, in_axes=axes, out_axes=None, donate_argnums=(0,))


def pmap_eval_step(step: Callable) -> Callable:
    """(variables, sharded batch) -> one result summed over the devices by the step itself."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None)


def mesh_train_step(step: Callable, layout: Any, rows_axis: int = 0) -> Callable:
    """(state, global batch, key) -> (state, metrics), by jit over a mesh of all devices.

    The compiler cuts the program as the arrays are cut, so that `step` has no axis name and
    sees the global batch. The state is donated, and comes back as it went in.

    Args:
      step: (state, batch, key) -> (state, metrics).
      layout: of the state; see `replicated` and `sharded`.
      rows_axis: of the batch, see `global_batch`.
    """
    plain, rows = _sharding(PartitionSpec()), _sharding(_along(rows_axis))
    inputs = (layout, rows, plain)
    return jax.jit(step, in_shardings=inputs, out_shardings=(layout, plain), donate_argnums=(0,))


def mesh_train_steps(steps: Callable, layout: Any, rows_axis: int) -> Callable:
    """(state, data, rows, count, key) -> (state, metrics), see `steps.multi_step`.

    As `mesh_train_step`; the data lie whole on every device.
    """
    plain, rows = _sharding(PartitionSpec()), _sharding(_along(rows_axis))
    inputs = (layout, plain, rows, plain, plain)
    return jax.jit(steps, in_shardings=inputs, out_shardings=(layout, plain), donate_argnums=(0,))


def mesh_eval_step(step: Callable) -> Callable:
    """(variables, global batch) -> one result of the whole batch; variables lie as they come."""
    shardings = (None, _sharding(_along(0)))
    return jax.jit(step, in_shardings=shardings, out_shardings=_sharding(PartitionSpec()))


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
        out = np.asarray(mapped(variables, shard_batch(padded)))
        return out.reshape(-1, *out.shape[2:])[:size]

    return predict


def shard_batch(batch: Mapping[str, Any], axis: int = 0) -> dict[str, np.ndarray]:
    """Rows (B, ...) to (devices, B / devices, ...).

    Args:
      batch: arrays of as many rows.
      axis: of the rows; what comes before it, members of an ensemble, follows the devices.

    Raises:
      ValueError: B is not a multiple of the number of local devices.
    """
    devices, rows = jax.local_device_count(), _local_rows(batch, axis)

    def sharded(x: np.ndarray) -> np.ndarray:
        shape = (*x.shape[:axis], devices, rows // devices, *x.shape[axis + 1 :])
        return np.moveaxis(x.reshape(shape), axis, 0)

    return {name: sharded(x) for name, x in batch.items()}


def free_bytes() -> int | None:
    """Memory that is left on this process's first device; None where it does not tell."""
    facts = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in facts:
        return None
    return facts["bytes_limit"] - facts["bytes_in_use"]


def global_batch(batch: Mapping[str, Any], axis: int = 0) -> dict[str, jax.Array]:
    """This process's rows (B, ...) as its part of the global batch, on its devices.

    Args:
      batch: arrays of as many rows.
      axis: of the rows; what comes before it are members of an ensemble.

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
        raise ValueError(f"a batch of {rows} rows does not divide over {devices} devices")
    return rows


def process_shard() -> dict[str, int]:
    """Which process this is of how many: what cuts a batch for it."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def num_devices() -> int:
    """Devices that share a batch."""
    return jax.device_count()


def axis_name_of(mode: str) -> str | None:
    """The axis name of a step under `parallel.mode`; none for mesh, see `mesh_train_step`."""
    return AXIS if mode == "pmap" else None


def num_shards_of(mode: str) -> int:
    """Devices whose rows a step sees: its own alone, or under mesh those of all."""
    return 1 if mode == "pmap" else jax.device_count()


def check_batch_size(batch_size: int, accumulate: int) -> None:
    """Raises ValueError where a batch cannot be cut for the devices and for accumulation."""
    unit = jax.device_count() * accumulate
    if batch_size % unit:
        raise ValueError(
            f"batch_size is {batch_size}; expected a multiple of {unit}: "
            f"{jax.device_count()} devices x {accumulate} parts"
        )


def round_up_to_devices(batch_size: int) -> int:
    """The next multiple of the number of local devices."""
    return batch_size + -batch_size % jax.local_device_count()


def to_host(tree: Any) -> Any:
    """Numpy copies of a tree, each array whole; safe to keep while the state is donated on.

    All processes call it together, for arrays that are cut over them.
    """
    return jax.tree.map(_to_host, tree)


def _to_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.array(x)
