"""Learning-rate schedules and optimisers, built with optax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax


def make_schedule(
    config: Mapping[str, Any], num_steps: int, steps_per_epoch: int = 1
) -> optax.Schedule:
    """Builds a linear warm-up followed by one cosine decay to `final_learning_rate`.

    Args:
      config: Fields learning_rate, final_learning_rate, warmup_steps (at most a quarter of the run
        is used), and lr_update: "step", or "epoch", where all steps of an epoch use the rate of
        its first step.
      num_steps: Length of the run, at which the cosine ends.
      steps_per_epoch: For lr_update "epoch".

    Returns:
      step -> learning rate.
    """
    warmup = min(config["warmup_steps"], num_steps // 4)
    rate, final = config["learning_rate"], config["final_learning_rate"]
    floor = final / rate if rate else 0.0
    schedule = optax.cosine_decay_schedule(rate, max(num_steps - warmup, 1), floor)
    if warmup:
        rise = optax.linear_schedule(0.0, rate, warmup)
        schedule = optax.join_schedules([rise, schedule], [warmup])
    if config["lr_update"] == "step":
        return schedule
    return lambda step: schedule(step // steps_per_epoch * steps_per_epoch)


def make_optimizer(
    config: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Builds AdamW or SGD, with clipping by global norm if `clip_norm` is above 0.

    Args:
      config: Fields name ("adamw" or "sgd"), weight_decay, clip_norm, learning_rate, and
        encoder_learning_rate: if above 0, pretrained encoders use the schedule scaled to it.
      schedule: step -> learning rate.

    Returns:
      The gradient transformation.
    """
    optimizer = _rule(config, schedule)
    if config["encoder_learning_rate"] > 0:
        factor = config["encoder_learning_rate"] / config["learning_rate"]
        slow = _rule(config, lambda step: factor * schedule(step))
        optimizer = optax.multi_transform({"pretrained": slow, "rest": optimizer}, encoder_labels)
    if config["clip_norm"] <= 0:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config["clip_norm"]), optimizer)


def encoder_labels(params: Any) -> Any:
    """Labels the leaves of `params` below a pretrained encoder "pretrained", the others "rest"."""

    def label(path: tuple[Any, ...], _: Any) -> str:
        return (
            "pretrained" if any(getattr(key, "key", "") == "pretrained" for key in path) else "rest"
        )

    return jax.tree_util.tree_map_with_path(label, params)


def _rule(config: Mapping[str, Any], schedule: optax.Schedule) -> optax.GradientTransformation:
    if config["name"] == "sgd":
        return optax.sgd(schedule)
    return optax.adamw(schedule, weight_decay=config["weight_decay"])
