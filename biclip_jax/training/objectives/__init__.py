"""Training objectives, one module per model family."""
