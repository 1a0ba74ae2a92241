"""What a config builds: model, steps, batches, pseudo-labels."""
