"""Named random streams, derived from the seed and never stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

STREAMS = ("params", "augment")


def stream(config: ConfigDict, name: str) -> jax.Array:
    """Returns the key of a stream; for an ensemble, one key per member on the first axis."""
    keys = member_keys(config, name)
    return keys[0] if len(keys) == 1 else jnp.stack(keys)


def member_keys(config: ConfigDict, name: str) -> list[jax.Array]:
    """Returns the key of a stream for every ensemble member, derived from the member's seed."""
    index = STREAMS.index(name)
    seeds = range(config.seed, config.seed + config.ensemble)
    return [jax.random.fold_in(jax.random.key(seed), index) for seed in seeds]
