"""What a configuration compiles to: the model, the state it begins with, the steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from biclip_jax import image_towers, parallel, sentences
from biclip_jax.errors import UserError
from biclip_jax.evaluation import steps as eval_steps
from biclip_jax.models import biclip
from biclip_jax.models.ensemble import Ensemble
from biclip_jax.models.text import PooledTower
from biclip_jax.training import objective, optim, steps
from biclip_jax.training import state as train_state


class Program(NamedTuple):
    """What a configuration compiles to.

    With several members, state, batch and key have a leading axis of them.

    Attributes:
      initial: the state before the first step.
      train_step: (state, sharded batch, key) -> (state, metrics), on all devices.
      eval_step: (variables, sharded batch) -> sums for Dice and IoU.
      schedule: step -> learning rate.
      num_steps: of the whole run.
      eval_every: steps between two evaluations.
      num_members: of the ensemble; 1 for a single model.
      num_labelled: pictures with masks, of the training split.
      labelled_rows: of a batch, the first ones.
      described: the model folder's config.json, but for the step.
    """

    initial: train_state.TrainState
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    schedule: Callable[[int], Any]
    num_steps: int
    eval_every: int
    num_members: int
    num_labelled: int
    labelled_rows: int
    described: dict[str, Any]


def build(
    config: ConfigDict,
    num_labelled: int,
    spoken: sentences.Sentences,
    tower: sentences.TextTower | None = None,
    image_tower: image_towers.OpenedTower | None = None,
) -> Program:
    """Model, optimiser and steps, and the state they begin with.

    Args:
      config: resolved.
      num_labelled: pictures with masks; they make an epoch.
      spoken: the sentences.
      tower, image_tower: pretrained, where configured.

    Raises:
      UserError: fields that do not go together.
    """
    rows = labelled_rows(config)
    steps_per_epoch = max(num_labelled // rows, 1)
    num_steps = config.num_steps or config.num_epochs * steps_per_epoch
    try:
        check_batch(config, rows)
        model, variables = build_model(config, spoken, tower, image_tower)
        recipe = objective.make_recipe(config.to_dict(), rows / config.batch_size)
    except ValueError as error:
        raise UserError(f"--config: {error}") from error
    schedule = optim.make_schedule(config.optim.to_dict(), num_steps)
    optimizer = optim.make_optimizer(config.optim.to_dict(), schedule)
    keeps_tower = image_tower is not None and not config.model.image.trainable
    frozen = {"image_tower"} & variables[0]["params"].keys() if keeps_tower else ()
    train_step: Callable[..., Any] = partial(
        steps.train_step,
        objective=partial(objective.objective, model=model, recipe=recipe),
        optimizer=optimizer,
        accumulate=config.optim.accumulate,
        ema_decay=config.optim.ema_decay,
        axis_name=parallel.AXIS,
    )
    states = [
        train_state.create(fresh, optimizer, frozen, config.optim.ema_decay > 0)
        for fresh in variables
    ]
    initial = states[0]
    if config.ensemble > 1:
        initial, train_step = train_state.stack(states), steps.in_turn(train_step)
        model = Ensemble(model, config.ensemble)
    eval_step = partial(eval_steps.eval_step, model=model, axis_name=parallel.AXIS)
    return Program(
        initial=initial,
        train_step=parallel.pmap_train_step(train_step),
        eval_step=parallel.pmap_eval_step(eval_step),
        schedule=schedule,
        num_steps=num_steps,
        eval_every=config.eval_every or steps_per_epoch,
        num_members=config.ensemble,
        num_labelled=num_labelled,
        labelled_rows=rows,
        described=describe(config, spoken, image_tower),
    )


def describe(
    config: ConfigDict, spoken: sentences.Sentences, image_tower: image_towers.OpenedTower | None
) -> dict[str, Any]:
    """What a model folder must say for `inference.load_model` to build this model again."""
    fields = model_fields(config)
    for part in ("text", "image"):
        fields[part] = {**fields[part], "weights": ""}  # a path here; the tower lies inside
    return {
        "kind": "biclip",
        "model": fields,
        "vocab_size": spoken.tokenizer.get_vocab_size(),
        "tower": spoken.tower,
        "image_tower": image_tower.fields if image_tower else {},
        "ensemble": config.ensemble,
        "name": config.name,
        "data": config.data.name,
    }


def labelled_rows(config: ConfigDict) -> int:
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
    if config.ensemble > 1 and config.model.text.trainable:
        raise ValueError("an ensemble shares its text tower; set model.text.trainable to false")
    parallel.check_batch_size(config.batch_size, parts)
    if parts > 1 and labelled < config.batch_size:
        raise ValueError(f"optim.accumulate is {parts}; unlabelled pictures need 1")
    share = config.batch_size // (parallel.num_devices() * parts)
    if config.views.strong.cutmix and share % 2:
        raise ValueError(
            f"views.strong.cutmix pairs the rows of a batch, and {config.batch_size} pictures "
            f"leave {share} to a device and part; expected an even number"
        )


def model_fields(config: ConfigDict) -> dict[str, Any]:
    """What `models.biclip.build` is given: `model`, and the heads that the losses need."""
    blocks = biclip.named_blocks(config.loss.iac_blocks, config.model.num_levels)
    if not blocks or not all(block.startswith("decoder") for block in blocks):
        raise ValueError(f"loss.iac_blocks is {config.loss.iac_blocks!r}; expected decoder blocks")
    fields = config.model.to_dict()
    refines = config.model.bmf.vision_to_text
    if config.model.image.encoder != "cnn" and not refines:
        raise ValueError("model.image.encoder is a tower, but bmf.vision_to_text is off; set cnn")
    heads = [head for head in biclip.HEADS if config.loss[head] > 0]
    return fields | {"heads": heads, "iac_blocks": list(blocks)}


def build_model(
    config: ConfigDict,
    spoken: sentences.Sentences,
    tower: sentences.TextTower | None,
    image_tower: image_towers.OpenedTower | None,
) -> tuple[biclip.BiCLIP, list[dict[str, Any]]]:
    """The model as it is trained, and each member's first variables; towers begin as converted.

    Raises:
      ValueError: sizes that do not go together.
    """
    make = partial(
        biclip.build,
        model_fields(config),
        vocab_size=spoken.tokenizer.get_vocab_size(),
        image_tower=image_tower and image_tower.module,
        axis_name=parallel.AXIS,
    )
    model = make()
    trained = tower if tower and config.model.text.trainable else None
    if trained:
        num_features = PooledTower(trained.module, config.model.text.pooling).num_features
        one = {"text_features": jnp.zeros((1, num_features))}
    else:
        one = {k: jnp.asarray(v[:1]) for k, v in spoken.fields["train"].items()}
    text = biclip.text_inputs(one)
    members = [biclip.init(model, key, text) for key in member_keys(config, "params")]
    for variables in members:
        if trained and model.uses_text:
            variables["params"]["text_encoder"] = {"tower": trained.params}
        # Named after the model's field; absent where nothing refines the sentence.
        if image_tower and "image_tower" in variables["params"]:
            variables["params"]["image_tower"] = image_tower.params
            if image_tower.batch_stats:
                variables["batch_stats"]["image_tower"] = image_tower.batch_stats
    return make(tower=trained.module) if trained else model, members


def stream(config: ConfigDict, name: str) -> jax.Array:
    """The key of a named random stream; of an ensemble, one a member along the first axis."""
    keys = member_keys(config, name)
    return keys[0] if len(keys) == 1 else jnp.stack(keys)


def member_keys(config: ConfigDict, name: str) -> list[jax.Array]:
    """Each member's key of a named random stream: derived from its seed, never stored."""
    index = ("params", "augment").index(name)
    seeds = range(config.seed, config.seed + config.ensemble)
    return [jax.random.fold_in(jax.random.key(seed), index) for seed in seeds]
