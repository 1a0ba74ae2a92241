"""What a family of models hands to `program`: networks, first variables, the loss."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


class Assembly(NamedTuple):
    """A model before its optimiser.

    Attributes:
      model: as it is trained.
      members: first variables, of each member of an ensemble.
      objective: see `training.steps.Objective`.
      frozen: names at the top of the parameters' tree that are never trained.
      linked: those of them that a model folder holds in a folder of their own.
      described: the model folder's config.json, but for the step.
      average_statistics: see `training.steps.train_step`.
    """

    model: nn.Module
    members: list[dict[str, Any]]
    objective: Callable[..., Any]
    frozen: Collection[str]
    linked: Collection[str]
    described: dict[str, Any]
    average_statistics: bool = True


def stream(config: ConfigDict, name: str) -> jax.Array:
    """The key of a named random stream; of an ensemble, one a member along the first axis."""
    keys = member_keys(config, name)
    return keys[0] if len(keys) == 1 else jnp.stack(keys)


def member_keys(config: ConfigDict, name: str) -> list[jax.Array]:
    """Each member's key of a named random stream: derived from its seed, never stored."""
    index = ("params", "augment").index(name)
    seeds = range(config.seed, config.seed + config.ensemble)
    return [jax.random.fold_in(jax.random.key(seed), index) for seed in seeds]
