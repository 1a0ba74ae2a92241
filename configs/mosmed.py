"""MosMedData+: slices of chest CT with infection masks, one sentence each (2183 / 273 / 273).

    python -m biclip_jax.train --config mosmed --config.data.source=DIR

The public split is by slice: slices of one patient lie in several splits, so
that scores on it are higher than on new patients.
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants: none (`published`, 224 px), `small` (a CPU), `smoke`, configs/variants.py's."""
    config = common.base()
    config.name = "mosmed"
    config.data.name = "mosmed_plus"
    return common.finish(config, variant)
