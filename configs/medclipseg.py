"""MedCLIPSeg (arXiv 2602.20423): adapters between the frozen encoders of CLIP.

biclip convert clip SOURCE weights/unimedclip --tokenizer FOLDER_OF_BIOMEDBERT
biclip train --config medclipseg --config.data.source=DIR \
    --config.model.encoders.weights=weights/unimedclip
"""

from ml_collections import ConfigDict

from biclip_jax.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """Variants, any number of them, comma-separated.

    Encoders: none (unimedclip), `clip`, `pubmedclip`, `biomedclip`. `reference`: losses,
    preprocessing and dropout of the released code. `p10`, `p25`, `p50`: the published label
    fractions. `covid19`, `eus`: datasets with their own recipe. `tiny`: randomly initialized
    encoders for CPUs. `smoke`: one minute on synthetic images.
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
    model.image_size = 224  # pixels; the input size of the image encoder
    model.max_length = 256  # tokens, including padding, which the adapters attend to
    model.dtype = "float32"  # dtype of the computation: float32 or bfloat16
    model.input = "clip"  # normalization of images: clip, or imagenet_bgr (as the reference)
    model.adapter_width = 256  # features of the adapters
    model.num_layers = 10  # adapters, before blocks 1, 2, ...
    model.beta = 2.35  # penalty on the standard deviation of a key in its attention score
    model.gate_init = 0.0  # initial logit of the gates; 0 gives equal weights
    model.num_upscales = 2  # upsampling steps of the patch features, factor 2 each
    model.num_samples = 30  # stochastic passes averaged in a prediction
    model.encoders = ConfigDict()  # frozen
    model.encoders.weights = ""  # output folder of `biclip convert clip`; empty: random
    model.encoders.dropout = 0.0  # of BERT during training; the reference has 0.1
    model.encoders.width = 768  # this and the next four: of randomly initialized encoders
    model.encoders.num_layers = 12
    model.encoders.num_heads = 12
    model.encoders.patch_size = 16  # pixels
    model.encoders.embedding_size = 512
    return model


def _loss() -> ConfigDict:
    """The parts of the loss."""
    loss = ConfigDict()
    loss.dice = 0.5  # weight
    loss.bce = 0.5  # weight of the binary cross-entropy
    loss.contrastive = 0.1  # weight
    loss.dice_over = "image"  # soft Dice per image, or per row as in the reference code
    loss.contrastive_kind = "described"  # as in the paper; released: as in the released code
    loss.temperature = 0.2  # temperature of the contrastive loss
    return loss


def _views() -> ConfigDict:
    """Augmentation; a horizontal flip also swaps left and right in the prompt."""
    views = ConfigDict()
    views.horizontal_flip = 0.0  # probability
    views.vertical_flip = 0.0  # probability; prompts are not adapted to it
    views.affine = 0.5  # probability of the joint rotation, translation and scaling
    views.rotation = 20.0  # degrees, in both directions
    views.translation = 0.0  # share of the image side, in both directions
    views.scale_low = 1.0
    views.scale_high = 1.0
    views.integer_degrees = False  # true: nearest-neighbor rotation, as the reference
    return views


def clip(config: ConfigDict) -> None:
    """OpenAI CLIP, ViT-B/16."""
    config.model.variant, config.model.max_length = "clip", 77


def pubmedclip(config: ConfigDict) -> None:
    """PubMedCLIP, ViT-B/32."""
    config.model.variant, config.model.max_length = "pubmedclip", 77
    config.model.encoders.patch_size = 32


def biomedclip(config: ConfigDict) -> None:
    """BiomedCLIP."""
    config.model.variant = "biomedclip"


def reference(config: ConfigDict) -> None:
    """Losses, preprocessing and dropout of the released code."""
    config.model.input, config.data.resize = "imagenet_bgr", "opencv"
    config.loss.dice_over, config.loss.contrastive_kind = "rows", "released"
    config.model.encoders.dropout = 0.1
    config.views.integer_degrees = True


def _share(percent: int):
    def share(config: ConfigDict) -> None:
        config.data.percent = percent

    return share


def covid19(config: ConfigDict) -> None:
    """QaTa-COV19: gates with a slightly lower initial value."""
    config.model.gate_init = -0.02


def eus(config: ConfigDict) -> None:
    """Endoscopic ultrasound: 26318 training images, 10 epochs."""
    config.num_epochs = 10


def tiny(config: ConfigDict) -> None:
    """Random encoders of 6 blocks at 112 px: tests the pipeline, not the published Dice."""
    config.model.image_size, config.model.max_length = 112, 48
    config.model.adapter_width, config.model.num_layers = 64, 4
    config.model.num_samples = 10
    encoders = config.model.encoders
    encoders.width, encoders.num_layers, encoders.num_heads = 192, 6, 3
    encoders.embedding_size, encoders.patch_size = 128, 8
    config.batch_size, config.num_epochs = 16, 20


def smoke(config: ConfigDict) -> None:
    """One minute on a CPU with synthetic images; keeps all other fields of `config`."""
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
