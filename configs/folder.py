"""Your own dataset, in any layout of docs/data.md.

biclip train --config folder --config.data.source=DIR --config.name=mine
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants: none (`published`, 224 px), `small` (for CPUs), `smoke`, those of variants.py."""
    config = common.base()
    config.name = "folder"
    return common.finish(config, variant)
