"""Training: losses, views, optimiser, train steps and checkpoints."""
