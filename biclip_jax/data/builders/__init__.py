"""Prepared datasets: the synthetic dataset, and one TFDS builder for all folder layouts."""
