"""Kvasir-SEG: polyps in endoscopy, one sentence each (800 / 100 / 100).

python -m biclip_jax.train --config kvasir --config.data.source=DIR
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants: none (`published`, 224 px), `small` (a CPU), `smoke`, configs/variants.py's."""
    config = common.base()
    config.name = "kvasir"
    config.data.name = "kvasir_seg"
    config.model.text.max_length = 64  # tokens; its prompts are longer than radiology's
    return common.finish(config, variant)
