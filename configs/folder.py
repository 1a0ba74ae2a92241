"""A data set of your own, in any layout of docs/data.md.

python -m biclip_jax.train --config folder --config.data.source=DIR --config.name=mine
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants: none (`published`, 224 px), `small` (a CPU), `smoke`, configs/variants.py's."""
    config = common.base()
    config.name = "folder"
    return common.finish(config, variant)
