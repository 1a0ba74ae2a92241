"""What only looks: metrics, the evaluation of a split, pictures and tables."""
