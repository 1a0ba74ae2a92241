"""CVC-ClinicDB: polyps in endoscopy, one caption per image (490 / 61 / 61).

    biclip train --config clinicdb --config.data.source=DIR

Frames of one video can be in several splits.
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants: none (`published`, 224 px), `small` (for CPUs), `smoke`, those of variants.py."""
    config = common.base()
    config.name = "clinicdb"
    config.data.name = "clinicdb"
    config.model.text.max_length = 64  # tokens; its captions are longer than those of radiology
    return common.finish(config, variant)
