"""Kvasir-SEG: polyps in endoscopy, one caption per image (800 / 100 / 100).

biclip train --config kvasir --config.data.source=DIR
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants: none (`published`, 224 px), `small` (for CPUs), `smoke`, those of variants.py."""
    config = common.base()
    config.name = "kvasir"
    config.data.name = "kvasir_seg"
    config.model.text.max_length = 64  # tokens; its captions are longer than those of radiology
    return common.finish(config, variant)
