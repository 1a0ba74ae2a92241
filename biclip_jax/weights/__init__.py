"""Weights on disk: model folders, and checkpoints of other frameworks."""
