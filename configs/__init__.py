"""Experiment configurations: one page each, `get_config(variant)` returns a ConfigDict."""
