"""BiCLIP in pure JAX: medical image segmentation with the help of a sentence."""

__version__ = "0.1.0"
