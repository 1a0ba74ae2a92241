"""Builds the initial train state and the compiled steps from a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from biclip_jax.core import distributed
from biclip_jax.core.errors import UserError
from biclip_jax.encoders import text as text_encoders
from biclip_jax.evaluation import steps as eval_steps
from biclip_jax.experiment import biclip_spec, medclipseg_spec
from biclip_jax.models.ensemble import Ensemble
from biclip_jax.training import optim, steps
from biclip_jax.training import state as train_state

MIN_EVAL_EVERY = 50  # steps between two evaluations, if `eval_every` is 0
# model.kind -> the module that opens its encoders, encodes its prompts and builds model and loss.
FAMILIES: dict[str, Any] = {"biclip": biclip_spec, "medclipseg": medclipseg_spec}


class Program(NamedTuple):
    """The initial state and the compiled steps of a run.

    For an ensemble, state, batch and key have a leading axis of members.

    Attributes:
      initial: State before the first step.
      place: Maps a full state on the host to the state on the devices.
      shard: Maps (rows of this process, axis of the rows) to a sharded batch.
      train_step: (state, sharded batch, key) -> (state, metrics), on all devices.
      train_steps: Several train steps over a split on the device, see `steps.multi_step`.
      eval_step: (variables, sharded batch) -> sums for Dice and IoU.
      schedule: Maps a step to its learning rate.
      num_steps: Length of the run.
      steps_per_call: Maximum number of steps per call of `train_steps`.
      eval_every: Steps between two evaluations.
      num_members: Number of ensemble members; 1 for a single model.
      num_labelled: Number of labelled training samples, including mixed ones.
      num_labelled_rows: Number of labelled rows of a batch; they come first.
      linked: Top-level parameters that a model folder stores in a folder of their own.
      model_config: config.json of the model folder, without the step.
    """

    initial: train_state.TrainState
    place: Callable[[train_state.TrainState], train_state.TrainState]
    shard: Callable[..., Any]
    train_step: Callable[..., Any]
    train_steps: Callable[..., Any]
    eval_step: Callable[..., Any]
    schedule: Callable[[int], Any]
    num_steps: int
    steps_per_call: int
    eval_every: int
    num_members: int
    num_labelled: int
    num_labelled_rows: int
    linked: Collection[str]
    model_config: dict[str, Any]


def build(
    config: ConfigDict,
    num_labelled: int,
    encoded_text: text_encoders.EncodedText,
    encoders: Any = None,
    num_val: int = 0,
) -> Program:
    """Builds model, optimizer, compiled steps and the initial state.

    Args:
      config: Resolved config.
      num_labelled: Number of training images with masks; they define an epoch.
      encoded_text: Encoded prompts of the run.
      encoders: Pretrained encoders from the family's `open_encoders`; None opens those of the
        config.
      num_val: Number of validation images. If `eval_every` is 0, validation runs at most as often
        as its batches take steps: with few labels an epoch is short, and validation would take
        most of the time. `MIN_EVAL_EVERY` limits the time for checkpoints in the same way.

    Raises:
      UserError: Incompatible config fields.
    """
    rows = num_labelled_rows(config)
    steps_per_epoch = -(-num_labelled // rows)  # the last batch takes rows of the next epoch
    num_steps = config.num_steps or config.num_epochs * steps_per_epoch
    # On CPU, XLA runs the convolutions inside a loop on one core.
    steps_per_call = 1 if jax.default_backend() == "cpu" else config.data.steps_per_call
    family = FAMILIES[config.model.kind]
    encoders = family.open_encoders(config) if encoders is None else encoders
    try:
        check_batch(config, rows)
        built = family.make_spec(config, encoded_text, encoders, rows / config.batch_size)
    except ValueError as error:
        raise UserError(f"--config: {error}") from error
    axis_name = distributed.axis_name_of(config.parallel.mode)
    schedule = optim.make_schedule(config.optim.to_dict(), num_steps, steps_per_epoch)
    optimizer = optim.make_optimizer(config.optim.to_dict(), schedule)
    train_step: Callable[..., Any] = partial(
        steps.train_step,
        objective=built.objective,
        optimizer=optimizer,
        accumulate=config.optim.accumulate,
        ema_decay=config.optim.ema_decay,
        average_statistics=built.average_statistics,
        axis_name=axis_name,
        num_shards=distributed.num_shards_of(config.parallel.mode),
    )
    states = [
        train_state.create(fresh, optimizer, built.frozen, config.optim.ema_decay > 0)
        for fresh in built.members
    ]
    initial, model = states[0], built.model
    if config.ensemble > 1:
        initial, train_step = train_state.stack(states), steps.ensemble_step(train_step)
        model = Ensemble(model, config.ensemble)
    eval_step = partial(eval_steps.eval_step, model=model, axis_name=axis_name)
    return Program(
        initial=initial,
        **compile_steps(
            config, initial, train_step, steps.multi_step(train_step, steps_per_call), eval_step
        ),
        schedule=schedule,
        num_steps=num_steps,
        steps_per_call=steps_per_call,
        eval_every=config.eval_every
        or max(steps_per_epoch, num_val // config.batch_size, MIN_EVAL_EVERY),
        num_members=config.ensemble,
        num_labelled=num_labelled,
        num_labelled_rows=rows,
        linked=built.linked,
        model_config=built.model_config,
    )


def compile_steps(
    config: ConfigDict,
    initial: train_state.TrainState,
    train_step: Callable[..., Any],
    train_steps: Callable[..., Any],
    eval_step: Callable[..., Any],
) -> dict[str, Callable[..., Any]]:
    """Compiles the steps for all devices; returns them with `place` and `shard`, see `Program`."""
    if config.parallel.mode == "pmap":
        return {
            "place": distributed.replicate,
            "shard": distributed.shard_batch,
            "train_step": distributed.pmap_train_step(train_step),
            "train_steps": distributed.pmap_train_steps(train_steps),
            "eval_step": distributed.pmap_eval_step(eval_step),
        }
    shardings, rows_axis = state_shardings(initial, config.parallel.shard), int(config.ensemble > 1)
    return {
        "place": partial(distributed.put, shardings=shardings),
        "shard": distributed.global_batch,
        "train_step": distributed.mesh_train_step(train_step, shardings, rows_axis),
        "train_steps": distributed.mesh_train_steps(train_steps, shardings, 1 + rows_axis),
        "eval_step": distributed.mesh_eval_step(eval_step),
    }


def state_shardings(state: train_state.TrainState, shard: str) -> train_state.TrainState:
    """Returns the shardings of a state on a mesh: replicated, or split as `parallel.shard` says."""
    if shard == "all":
        return distributed.sharded(state)
    shardings = distributed.replicated(state)
    if shard == "optimizer":
        shardings = dataclasses.replace(shardings, opt_state=distributed.sharded(state.opt_state))
    return shardings


def num_labelled_rows(config: ConfigDict) -> int:
    """Returns the number of labelled rows of a batch, even if there are unlabelled rows."""
    if not config.data.unlabelled:
        return config.batch_size
    rows = 2 * round(config.batch_size / (1 + config.data.unlabelled_ratio) / 2)
    if not 2 <= rows <= config.batch_size - 2:
        raise UserError(
            f"--config.data.unlabelled_ratio: {config.data.unlabelled_ratio} gives {rows} labelled "
            f"images in a batch of {config.batch_size}; expected 2 to {config.batch_size - 2}"
        )
    return rows


def check_batch(config: ConfigDict, num_labelled_rows: int) -> None:
    """Raises ValueError if a batch cannot be split for the devices, the parts and the views."""
    parts = config.optim.accumulate
    distributed.check_batch_size(config.batch_size, parts)
    if parts > 1 and num_labelled_rows < config.batch_size:
        raise ValueError(f"optim.accumulate is {parts}; expected 1 with unlabelled images")
    rows = config.batch_size // (distributed.num_devices() * parts)
    if config.views.get("strong", {}).get("cutmix") and rows % 2:
        raise ValueError(
            f"views.strong.cutmix pairs the rows of a batch, but batch_size {config.batch_size} "
            f"gives {rows} rows per device and part; expected an even number"
        )
