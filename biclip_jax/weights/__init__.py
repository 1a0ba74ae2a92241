"""Parameters on disk: model folders and other people's checkpoints."""
