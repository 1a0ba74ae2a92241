"""MosMedData+: slices of chest CT with infection masks, one caption per image (2183 / 273 / 273).

    biclip train --config mosmed --config.data.source=DIR

The public split is by slice: slices of one patient are in several splits, so scores are higher than
on new patients.
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants: none (`published`, 224 px), `small` (for CPUs), `smoke`, those of variants.py."""
    config = common.base()
    config.name = "mosmed"
    config.data.name = "mosmed_plus"
    return common.finish(config, variant)
