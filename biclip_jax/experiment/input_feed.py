"""Feeds batches to the train step, streamed from the host or gathered from a split on the device.

Both read the same records in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from biclip_jax.core import distributed
from biclip_jax.core.errors import UserError
from biclip_jax.data import pipeline
from biclip_jax.experiment.program import Program

# (state, key, step, limit) -> (state after 1 to `limit` steps, metrics of these steps)
Advance = Callable[[Any, Any, int, int], tuple[Any, list[Any]]]


def open_feed(
    config: Mapping[str, Any],
    program: Program,
    records: Sequence[Any],
    texts: Mapping[str, np.ndarray],
    step: int,
) -> Advance:
    """Returns the function that the training loop calls for its next steps.

    Args:
      config: Config of the run, as nested mappings.
      program: Compiled steps of the run.
      records: Training records, labelled ones first.
      texts: Text fields of the same records, see `pipeline.text_fields`.
      step: First step.

    Raises:
      UserError: `data.on_device` is set, but the split does not fit on the device.
    """
    rows = pipeline.training_order(
        len(records),
        batch_size=config["batch_size"],
        seed=config["seed"],
        num_labelled=program.num_labelled,
        labelled_rows=program.num_labelled_rows,
        num_members=program.num_members,
        **distributed.process_shard(),
    )
    rows_axis = int(program.num_members > 1)
    if config["data"]["on_device"]:
        return _on_device(program, pipeline.stack_split(records, texts), rows, rows_axis)
    return _streamed(program, pipeline.train_batches(records, texts, rows, step), rows_axis)


def _streamed(program: Program, batches: Any, rows_axis: int) -> Advance:
    """Takes one step per call; the next batch is read and sent while the device computes."""

    def advance(state: Any, key: Any, step: int, limit: int) -> tuple[Any, list[Any]]:
        batch = program.shard(next(batches), axis=rows_axis)
        state, metrics = program.train_step(state, batch, key)
        return state, [metrics]

    return advance


def _on_device(
    program: Program, data: Mapping[str, np.ndarray], rows: Callable[[int], Any], rows_axis: int
) -> Advance:
    """Takes up to `program.steps_per_call` steps per call; only record indices are sent."""
    megabytes = sum(x.nbytes for x in data.values()) / 1e6
    free = distributed.free_bytes()
    if free is not None and megabytes * 1e6 > free:
        raise UserError(
            f"--config.data.on_device: the training split needs {megabytes:.0f} MB, but the device "
            f"has {free / 1e6:.0f} MB free; set it to false"
        )
    print(f"{len(data['image'])} training records on the device, {megabytes:.0f} MB")
    placed, length = distributed.replicate(dict(data)), program.steps_per_call

    def advance(state: Any, key: Any, step: int, limit: int) -> tuple[Any, list[Any]]:
        count = min(limit, length)
        picked = [rows(step + min(i, count - 1)) for i in range(length)]
        stacked = {name: np.stack([row[name] for row in picked]) for name in picked[0]}
        sharded = program.shard(stacked, axis=1 + rows_axis)
        state, metrics = program.train_steps(state, placed, sharded, np.int32(count), key)
        values = jax.device_get(metrics)
        return state, [jax.tree.map(lambda x, i=i: x[i], values) for i in range(count)]

    return advance
