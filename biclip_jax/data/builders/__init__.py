"""TFDS builders: the synthetic set, and one builder for folders on disk."""

from biclip_jax.data.builders.preparation import prepare
from biclip_jax.data.builders.prepared import open_split, verify

__all__ = ["open_split", "prepare", "verify"]
