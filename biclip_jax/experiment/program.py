"""What a configuration compiles to: the state a run begins with, and the steps."""

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

MIN_EVAL_EVERY = 50  # between two evaluations, where `eval_every` leaves it open
# model.kind -> the module that knows its towers, sentences, variables and loss
FAMILIES: dict[str, Any] = {"biclip": biclip_spec, "medclipseg": medclipseg_spec}


class Program(NamedTuple):
    """What a configuration compiles to.

    With several members, state, batch and key have a leading axis of them.

    Attributes:
      initial: the state before the first step.
      place: whole state -> state on the devices.
      shard: (this process's rows, their axis) -> sharded batch.
      train_step: (state, sharded batch, key) -> (state, metrics), on all devices.
      train_steps: several of them over a split on the device, see `steps.multi_step`.
      eval_step: (variables, sharded batch) -> sums for Dice and IoU.
      schedule: step -> learning rate.
      num_steps: of the whole run.
      steps_at_once: at most, of `train_steps`.
      eval_every: steps between two evaluations.
      num_members: of the ensemble; 1 for a single model.
      num_labelled: pictures with masks, of the training split.
      num_labelled_rows: of a batch, the first ones.
      linked: parameters that a model folder holds in a folder of their own.
      described: the model folder's config.json, but for the step.
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
    described: dict[str, Any]


def build(
    config: ConfigDict,
    num_labelled: int,
    encoded_text: text_encoders.EncodedText,
    encoders: Any = None,
    num_val: int = 0,
) -> Program:
    """Model, optimiser and steps, and the state they begin with.

    Args:
      config: resolved.
      num_labelled: pictures with masks; they make an epoch.
      spoken: the sentences.
      towers: pretrained, what the family's `open_towers` gave; None: those of the configuration.
      num_val: pictures of the validation split, for which `eval_every` makes room where it is 0:
        few labels make short epochs, and most of the time would go to validation, and with few
        pictures in all to saving, which `MIN_EVAL_EVERY` keeps apart.

    Raises:
      UserError: fields that do not go together.
    """
    rows = num_labelled_rows(config)
    steps_per_epoch = -(-num_labelled // rows)  # the last batch is filled from the next epoch
    num_steps = config.num_steps or config.num_epochs * steps_per_epoch
    # A CPU runs a loop's convolutions on one core.
    num_at_once = 1 if jax.default_backend() == "cpu" else config.data.steps_per_call
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
        shares=distributed.num_shards_of(config.parallel.mode),
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
            config, initial, train_step, steps.multi_step(train_step, num_at_once), eval_step
        ),
        schedule=schedule,
        num_steps=num_steps,
        steps_per_call=num_at_once,
        eval_every=config.eval_every
        or max(steps_per_epoch, num_val // config.batch_size, MIN_EVAL_EVERY),
        num_members=config.ensemble,
        num_labelled=num_labelled,
        num_labelled_rows=rows,
        linked=built.linked,
        described=built.described,
    )


def compile_steps(
    config: ConfigDict,
    initial: train_state.TrainState,
    train_step: Callable[..., Any],
    train_steps: Callable[..., Any],
    eval_step: Callable[..., Any],
) -> dict[str, Callable[..., Any]]:
    """The steps on all devices, and how state and batches come to them; see `Program`."""
    if config.parallel.mode == "pmap":
        return {
            "place": distributed.replicate,
            "shard": distributed.shard_batch,
            "train_step": distributed.pmap_train_step(train_step),
            "train_steps": distributed.pmap_train_steps(train_steps),
            "eval_step": distributed.pmap_eval_step(eval_step),
        }
    layout, members = state_shardings(initial, config.parallel.shard), int(config.ensemble > 1)
    return {
        "place": partial(distributed.put, layout=layout),
        "shard": distributed.global_batch,
        "train_step": distributed.mesh_train_step(train_step, layout, members),
        "train_steps": distributed.mesh_train_steps(train_steps, layout, 1 + members),
        "eval_step": distributed.mesh_eval_step(eval_step),
    }


def state_shardings(state: train_state.TrainState, shard: str) -> train_state.TrainState:
    """How a state lies on a mesh: whole, or with what `parallel.shard` names cut."""
    if shard == "all":
        return distributed.sharded(state)
    layout = distributed.replicated(state)
    if shard == "optimizer":
        layout = dataclasses.replace(layout, opt_state=distributed.sharded(state.opt_state))
    return layout


def num_labelled_rows(config: ConfigDict) -> int:
    """Rows of a batch that have masks: all, or an even number by `data.unlabelled_ratio`."""
    if not config.data.unlabelled:
        return config.batch_size
    rows = 2 * round(config.batch_size / (1 + config.data.unlabelled_ratio) / 2)
    if not 2 <= rows <= config.batch_size - 2:
        raise UserError(
            f"--config.data.unlabelled_ratio: {config.data.unlabelled_ratio} makes {rows} labelled "
            f"pictures of a batch of {config.batch_size}; expected 2 to {config.batch_size - 2}"
        )
    return rows


def check_batch(config: ConfigDict, labelled: int) -> None:
    """Raises ValueError where a batch cannot be cut as the devices and the views need it."""
    parts = config.optim.accumulate
    distributed.check_batch_size(config.batch_size, parts)
    if parts > 1 and labelled < config.batch_size:
        raise ValueError(f"optim.accumulate is {parts}; unlabelled pictures need 1")
    share = config.batch_size // (distributed.num_devices() * parts)
    if config.views.get("strong", {}).get("cutmix") and share % 2:
        raise ValueError(
            f"views.strong.cutmix pairs the rows of a batch, and {config.batch_size} pictures "
            f"leave {share} to a device and part; expected an even number"
        )
