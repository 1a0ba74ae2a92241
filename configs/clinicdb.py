"""CVC-ClinicDB: polyps in endoscopy, one sentence each (490 / 61 / 61).

    python -m biclip_jax.train --config clinicdb --config.data.source=DIR

Frames of one video may lie in several splits.
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants: none (`published`, 224 px), `small` (a CPU), `smoke`, configs/variants.py's."""
    config = common.base()
    config.name = "clinicdb"
    config.data.name = "clinicdb"
    config.model.text.max_length = 64  # tokens; its prompts are longer than radiology's
    return common.finish(config, variant)
