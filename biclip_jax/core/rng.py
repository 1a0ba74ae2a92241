"""Named random streams: derived from the seed, never stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


def stream(config: ConfigDict, name: str) -> jax.Array:
    """The key of a named random stream; of an ensemble, one a member along the first axis."""
    keys = member_keys(config, name)
    return keys[0] if len(keys) == 1 else jnp.stack(keys)


def member_keys(config: ConfigDict, name: str) -> list[jax.Array]:
    """Each member's key of a named random stream: derived from its seed, never stored."""
    index = ("params", "augment").index(name)
    seeds = range(config.seed, config.seed + config.ensemble)
    return [jax.random.fold_in(jax.random.key(seed), index) for seed in seeds]
