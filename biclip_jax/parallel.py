"""The only place that knows of devices: pmap, placement, gathering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"


def replicate(tree: Any) -> Any:
    """A tree of host or device arrays, whole on every local device.

    A step's output lies so, too: the first call then compiles for all later ones.
    """
    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    # A copy: a step that donates its state must not delete the caller's.
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()), may_alias=False)


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
    """(variables, host batch) -> (B, ...) host array; pads B to the number of devices."""
    mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=0)

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
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes; this version runs on one host only")
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
