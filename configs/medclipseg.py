"""MedCLIPSeg (arXiv 2602.20423): adapters between the frozen towers of a CLIP.

python -m biclip_jax.convert clip SOURCE weights/unimedclip --tokenizer FOLDER_OF_BIOMEDBERT
python -m biclip_jax.train --config medclipseg --config.data.source=DIR \
    --config.model.encoders.weights=weights/unimedclip
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants, any number of them, comma-separated.

    Towers: none (unimedclip), `clip`, `pubmedclip`, `biomedclip`. `reference`: the released
    code's losses, preprocessing and dropout. `p10`, `p25`, `p50`: the published shares of the
    labels. `covid19`, `eus`: data sets with recipes of their own. `tiny`: random towers for
    a CPU; `smoke`: a minute over synthetic pictures.
    """
    config = common.base()
    config.name = "medclipseg"
    config.batch_size, config.num_epochs = 24, 100
    config.model, config.loss, config.views = _model(), _loss(), _views()
    config.optim.learning_rate = 3e-4
    config.optim.final_learning_rate = 1e-4
    config.optim.lr_update = "epoch"
    config.optim.weight_decay = 0.0  # Adam
    return common.apply(config, variant, VARIANTS)


def _model() -> ConfigDict:
    """The network."""
    model = ConfigDict()
    model.kind = "medclipseg"
    model.variant = "unimedclip"  # clip, pubmedclip, unimedclip, biomedclip
    model.image_size = 224  # pixels; the image tower's own
    model.max_length = 256  # tokens, padding included: the adapters see it, too
    model.dtype = "float32"  # of the computation: float32 or bfloat16
    model.input = "clip"  # statistics of the pictures: clip, or imagenet_bgr (the reference)
    model.adapter_width = 256  # features of the adapters
    model.num_layers = 10  # adapters, before the blocks 1, 2, ...
    model.beta = 2.35  # how much a key's standard deviation lowers its score
    model.gate_init = 0.0  # of the gates' logits; 0 is half and half
    model.num_upscales = 2  # doublings of the patches' map
    model.num_samples = 30  # passes whose mean a prediction is
    model.encoders = ConfigDict()  # frozen
    model.encoders.weights = ""  # a folder that biclip_jax.convert clip wrote; empty: random
    model.encoders.dropout = 0.0  # in a BERT during training; 0.1 in the reference
    model.encoders.width = 768  # this and what follows: of random towers
    model.encoders.num_layers = 12
    model.encoders.num_heads = 12
    model.encoders.patch_size = 16  # pixels
    model.encoders.embedding_size = 512
    return model


def _loss() -> ConfigDict:
    """The parts of the loss."""
    loss = ConfigDict()
    loss.dice = 0.5  # weight
    loss.bce = 0.5  # weight of the cross-entropy
    loss.contrastive = 0.1  # weight
    loss.dice_over = "image"  # soft Dice of an image, or of its rows as the reference computes
    loss.contrastive_kind = "described"  # as in the paper; released: as its code computes
    loss.temperature = 0.2  # of the contrastive loss
    return loss


def _views() -> ConfigDict:
    """How pictures are changed in training; a horizontal flip exchanges the sentence's sides."""
    views = ConfigDict()
    views.horizontal_flip = 0.0  # probability
    views.vertical_flip = 0.0  # probability; no sentence follows it
    views.affine = 0.5  # probability of rotation, translation and scale together
    views.rotation = 20.0  # degrees, either way
    views.translation = 0.0  # of the picture's side, either way
    views.scale_low = 1.0
    views.scale_high = 1.0
    views.integer_degrees = False  # true: turns to the nearest pixel alone, as the reference does
    return views


def clip(config: ConfigDict) -> None:
    """OpenAI's towers, ViT-B/16."""
    config.model.variant, config.model.max_length = "clip", 77


def pubmedclip(config: ConfigDict) -> None:
    """PubMedCLIP's towers, ViT-B/32."""
    config.model.variant, config.model.max_length = "pubmedclip", 77
    config.model.encoders.patch_size = 32


def biomedclip(config: ConfigDict) -> None:
    """BiomedCLIP's towers."""
    config.model.variant = "biomedclip"


def reference(config: ConfigDict) -> None:
    """The released code's losses, preprocessing and dropout."""
    config.model.input, config.data.resize = "imagenet_bgr", "opencv"
    config.loss.dice_over, config.loss.contrastive_kind = "rows", "released"
    config.model.encoders.dropout = 0.1
    config.views.integer_degrees = True


def _share(percent: int):
    def share(config: ConfigDict) -> None:
        config.data.percent = percent

    return share


def covid19(config: ConfigDict) -> None:
    """QaTa-COV19: gates that begin a little more closed."""
    config.model.gate_init = -0.02


def eus(config: ConfigDict) -> None:
    """Endoscopic ultrasound: 26318 training pictures, 10 epochs."""
    config.num_epochs = 10


def tiny(config: ConfigDict) -> None:
    """Random towers of 6 blocks at 112 px: runs the pipeline, not the published Dice."""
    config.model.image_size, config.model.max_length = 112, 48
    config.model.adapter_width, config.model.num_layers = 64, 4
    config.model.num_samples = 10
    encoders = config.model.encoders
    encoders.width, encoders.num_layers, encoders.num_heads, encoders.embedding_size = (
        192,
        6,
        3,
        128,
    )
    encoders.patch_size = 8
    config.batch_size, config.num_epochs = 16, 20


def smoke(config: ConfigDict) -> None:
    """A run of a minute on a CPU over synthetic pictures, with the rest of `config` kept."""
    tiny(config)
    config.data.name, config.data.source, config.data.layout = "synthetic", "", ""
    config.data.percent = 100
    config.data.num_examples = ConfigDict({"train": 32, "val": 8, "test": 8})
    config.model.image_size, config.model.max_length = 56, 24
    config.model.adapter_width, config.model.num_layers, config.model.num_samples = 8, 2, 4
    encoders = config.model.encoders
    encoders.width, encoders.num_layers, encoders.num_heads, encoders.embedding_size = 16, 3, 2, 16
    config.batch_size, config.num_steps, config.eval_every, config.log_every = 8, 8, 4, 2


VARIANTS = {
    "p10": _share(10),
    "p25": _share(25),
    "p50": _share(50),
    **{
        function.__name__: function
        for function in (clip, pubmedclip, biomedclip, reference, covid19, eus, tiny, smoke)
    },
}
