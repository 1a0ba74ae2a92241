"""Schedules and optimisers by optax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax


def make_schedule(config: Mapping[str, Any], num_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then one cosine to 0 at `num_steps`.

    Args:
      config: fields learning_rate and warmup_steps.
      num_steps: length of the run.

    Returns:
      step -> learning rate.
    """
    warmup = min(config["warmup_steps"], max(num_steps - 1, 0))
    rate = config["learning_rate"]
    cosine = optax.cosine_decay_schedule(rate, max(num_steps - warmup, 1))
    if not warmup:
        return cosine
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), cosine], [warmup])


def make_optimizer(
    config: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
    """AdamW or SGD on all parameters, after clipping by global norm where `clip_norm` is above 0.

    Args:
      config: fields name ("adamw" or "sgd"), weight_decay, clip_norm.
      schedule: step -> learning rate.
    """
    if config["name"] == "sgd":
        optimizer = optax.sgd(schedule)
    else:
        optimizer = optax.adamw(schedule, weight_decay=config["weight_decay"])
    if config["clip_norm"] <= 0:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config["clip_norm"]), optimizer)
