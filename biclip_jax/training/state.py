"""The state of a run: everything a step changes, and nothing else."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
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
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState


def create(variables: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, from `model.init`'s variables."""
    # Arrays, not Python integers: those would cost a second compilation.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
    )


def variables_of(state: TrainState) -> dict[str, Any]:
    """The state's part that inference needs, as `model.apply` takes it."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def num_parameters(params: Any) -> int:
    """Number of values in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
