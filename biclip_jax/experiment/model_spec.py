"""What a family of models hands to `program`: networks, first variables, the loss."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import flax.linen as nn


class ModelSpec(NamedTuple):
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
