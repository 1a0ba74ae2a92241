"""Dataset files on disk to batches of host arrays."""
