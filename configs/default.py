"""The demo: synthetic chest images in which only the prompt says which lesions to segment.

    biclip train

It takes three minutes on two CPU cores and downloads nothing. A model that ignores the prompt stays
below 0.6 global Dice; docs/results.md has the results.
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants: those of configs/variants.py, `small` (112 px), `smoke`, `no_text`."""
    config = common.base()
    config.name = "demo"
    config.data.name = "synthetic"
    config.data.num_examples = ConfigDict({"train": 1600, "val": 100, "test": 200})
    config.model.image_size = 56
    config.model.width = 12
    config.model.num_levels = 4
    config.model.text.width = 64
    config.num_steps = 320
    config.eval_every = 160
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 50
    config.views.vertical_flip = 0.0
    return common.finish(config, variant, {"no_text": _no_text})


def _no_text(config: ConfigDict) -> None:
    """Trains and evaluates with empty prompts."""
    config.data.text_condition = "empty"
