"""Pretrained text and image encoders, and cached text features."""
