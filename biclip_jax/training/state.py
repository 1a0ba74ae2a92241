"""The training state."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int


@flax.struct.dataclass
class TrainState:
    """Everything that a train step updates, as a pytree.

    Attributes:
      step: () int32, number of steps including skipped ones; the random keys depend on it.
      skipped: () int32, number of steps with a non-finite loss or gradient; the schedule uses the
        optimiser's own count, step - skipped.
      params, batch_stats: Variables of the model, float32.
      opt_state: State of the optimiser.
      frozen: Parameters that are never trained; the model's tree is their union with `params`.
      ema: {"params", "batch_stats"}: exponential moving averages, or None.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    frozen: Any = flax.struct.field(default_factory=dict)
    ema: Any = None


def create(
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    frozen: Collection[str] = (),
    average: bool = False,
) -> TrainState:
    """Creates the state before the first step.

    Args:
      variables: Output of `model.init`.
      optimizer: Optimiser of the trained parameters.
      frozen: Top-level names of the parameters that are not trained.
      average: Whether to keep moving averages.
    """
    params = {name: part for name, part in variables["params"].items() if name not in frozen}
    averaged = {"params": params, "batch_stats": variables["batch_stats"]}
    if average:  # a copy: a donated state must not contain the same buffer twice
        averaged = jax.tree.map(jnp.copy, averaged)
    # Arrays, because Python integers would cause a second compilation.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        frozen={name: variables["params"][name] for name in frozen},
        ema=averaged if average else None,
    )


def inference_variables(state: TrainState) -> dict[str, Any]:
    """Returns the variables for inference, as `model.apply` takes them; moving averages if kept."""
    variables = state.ema or {"params": state.params, "batch_stats": state.batch_stats}
    return {**variables, "params": {**variables["params"], **state.frozen}}


def without_frozen(state: TrainState) -> TrainState:
    """Returns the state without the frozen parameters."""
    return dataclasses.replace(state, frozen={})


def stack(states: Sequence[TrainState]) -> TrainState:
    """Stacks the states of ensemble members along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def step_of(state: TrainState) -> int:
    """Returns the step as an integer; all members of an ensemble are at the same step."""
    return int(np.ravel(state.step)[0])


def num_parameters(params: Any) -> int:
    """Returns the number of values in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
