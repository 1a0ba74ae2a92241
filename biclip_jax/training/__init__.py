"""What changes parameters: losses, views, optimiser, steps, checkpoints."""
