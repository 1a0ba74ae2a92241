"""The demo: synthetic chest pictures in which only the sentence says which lesions are meant.

    python -m biclip_jax.train

Three minutes on two CPU cores, no download. A model that ignores the sentence
stays below 0.6 global Dice; see docs/results.md for the figures.
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
    """Never shows the model a sentence."""
    config.data.text_condition = "empty"
