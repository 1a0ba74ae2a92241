"""QaTa-COV19: chest X-rays with infection masks, one sentence each (5716 / 1429 / 2113).

python -m biclip_jax.train --config qata --config.data.source=DIR
python -m biclip_jax.train --config qata:small --config.data.source=DIR
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants: those of configs/variants.py, `cxr_bert`, `small` (a CPU), `smoke`.

    None: `published` with the scratch text encoder, 224 px.
    """
    config = common.base()
    config.name = "qata"
    config.data.name = "qata_cov19"
    return common.finish(config, variant, {"cxr_bert": _cxr_bert})


def _cxr_bert(config: ConfigDict) -> None:
    """`published` with its own text encoder; make the folder first:

    python -m biclip_jax.convert bert FOLDER_OF_CXR_BERT weights/cxr_bert
    """
    config.model.text.encoder = "bert"
    config.model.text.weights = "weights/cxr_bert"
