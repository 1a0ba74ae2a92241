"""Configs of the experiments: each module has `get_config(variant)`, which returns a ConfigDict."""
