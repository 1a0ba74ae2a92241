"""TFDS builders: the synthetic set, and one builder for folders on disk."""
