"""Interface between a model family and `program`: network, initial variables, loss."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import flax.linen as nn


class ModelSpec(NamedTuple):
    """A model without its optimizer.

    Attributes:
      model: Network as it is trained.
      members: Initial variables of every ensemble member.
      objective: Loss function, see `training.steps.Objective`.
      frozen: Top-level names of the parameter tree that are never trained.
      linked: Subset of `frozen` that a model folder stores in a separate folder.
      model_config: config.json of the model folder, without the step.
      average_statistics: See `training.steps.train_step`.
    """

    model: nn.Module
    members: list[dict[str, Any]]
    objective: Callable[..., Any]
    frozen: Collection[str]
    linked: Collection[str]
    model_config: dict[str, Any]
    average_statistics: bool = True
