"""The state of a run: everything a step changes, and nothing else."""

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
    """A pytree that a step maps to the next one.

    Attributes:
      step: () int32, steps taken, skipped ones included; the random keys follow it.
      skipped: () int32, steps whose loss or gradient was not finite; the
        schedule follows the optimiser's own count, step - skipped.
      params, batch_stats: of the model, float32.
      opt_state: of the optimiser.
      frozen: parameters that are never trained, beside `params` in the model's tree.
      ema: {"params", "batch_stats"}: exponential moving averages; None without.
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
    """The state before the first step.

    Args:
      variables: of `model.init`.
      optimizer: of the parameters that are trained.
      frozen: names at the top of the parameters' tree, of the others.
      average: whether to keep moving averages.
    """
    params = {name: part for name, part in variables["params"].items() if name not in frozen}
    averaged = {"params": params, "batch_stats": variables["batch_stats"]}
    if average:  # a copy: a step that donates its state may not be given one buffer twice
        averaged = jax.tree.map(jnp.copy, averaged)
    # Arrays, not Python integers: those would cost a second compilation.
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
    """The state's part that inference needs, as `model.apply` takes it; averages where kept."""
    kept = state.ema or {"params": state.params, "batch_stats": state.batch_stats}
    return {**kept, "params": {**kept["params"], **state.frozen}}


def without_frozen(state: TrainState) -> TrainState:
    """The state without the parameters that are never trained."""
    return dataclasses.replace(state, frozen={})


def stack(states: Sequence[TrainState]) -> TrainState:
    """The states of an ensemble's members as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def step_of(state: TrainState) -> int:
    """Steps taken; the members of an ensemble take them together."""
    return int(np.ravel(state.step)[0])


def num_parameters(params: Any) -> int:
    """Number of values in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
