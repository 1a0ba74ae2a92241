"""QaTa-COV19: chest X-rays with infection masks, one caption per image (5716 / 1429 / 2113).

biclip train --config qata --config.data.source=DIR
biclip train --config qata:small --config.data.source=DIR
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants: those of configs/variants.py, `cxr_bert`, `small` (for CPUs), `smoke`.

    Without a variant: `published` with the scratch text encoder, 224 px.
    """
    config = common.base()
    config.name = "qata"
    config.data.name = "qata_cov19"
    return common.finish(config, variant, {"cxr_bert": _cxr_bert})


def _cxr_bert(config: ConfigDict) -> None:
    """`published` with CXR-BERT as text encoder; convert its weights first:

    biclip convert bert FOLDER_OF_CXR_BERT weights/cxr_bert
    """
    config.model.text.encoder = "bert"
    config.model.text.weights = "weights/cxr_bert"
