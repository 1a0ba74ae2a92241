"""The loss of a batch, one module a model family."""
