"""Readers of weight file formats; nothing in a file is executed."""
