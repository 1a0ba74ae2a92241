"""Corruptions, text conditions, test-time augmentation, flip consistency."""
