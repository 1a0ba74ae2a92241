"""Every field there is, with its unit and the published default."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """The `published` BiCLIP at full size, without a data set."""
    config = ConfigDict()
    config.name = "biclip"
    config.seed = 0  # of parameters, shuffling and augmentation
    config.batch_size = 16  # pictures a step, over all devices
    config.num_epochs = 150
    config.num_steps = 0  # above 0: takes the place of num_epochs

    config.data = ConfigDict()
    config.data.name = "folder"  # synthetic, qata_cov19, mosmed_plus, kvasir_seg, clinicdb, folder
    config.data.source = ""  # folder on disk in one of the known layouts
    config.data.layout = ""  # lvit, languide, medclipseg, medvlsm, csv; empty: look and see
    config.data.prompt = ""  # p0..p9 of the medvlsm layout; empty: the last that is not empty
    config.data.cache_dir = ""  # where prepared sets go; empty: the user's cache folder
    config.data.in_memory = True  # decoded pictures stay in host memory
    config.data.sentences = "right"  # "missing" trains and evaluates with empty sentences
    config.data.label_fraction = 1.0  # share of the training pictures, in whole patients
    config.data.label_seed = 0  # of the order in which patients join the share
    config.data.num_examples = ConfigDict({"train": 0, "val": 0, "test": 0})  # synthetic only

    config.model = ConfigDict()
    config.model.image_size = 224  # pixels; 112, 224, 448 with five levels
    config.model.width = 64  # channels of the U-Net's first level; scales every encoder
    config.model.num_levels = 5  # of the U-Net, the bottleneck included
    config.model.dtype = "float32"  # of the computation: float32 or bfloat16
    config.model.text = ConfigDict()
    config.model.text.encoder = "scratch"  # trained on the captions' own words; bert, clip: a tower
    config.model.text.weights = ""  # of bert and clip: a folder that biclip_jax.convert wrote
    config.model.text.trainable = False  # bert, clip: false computes each sentence's vector once
    config.model.text.pooling = (
        "all_tokens"  # bert, clip: all_tokens (published), masked, embedding
    )
    config.model.text.width = 128  # this and the next two: of the scratch encoder
    config.model.text.num_layers = 2
    config.model.text.num_heads = 4
    config.model.text.max_length = 32  # tokens

    config.loss = ConfigDict()
    config.loss.gen = 0.1  # weight of the generator's L1
    config.loss.iac = 0.05  # weight of the consistency between views
    config.loss.cycle = 0.07  # weight of the cycle
    config.loss.double_sigmoid = False  # true: repeats a slip of the published training code

    config.views = ConfigDict()
    config.views.horizontal_flip = 0.5  # probability
    config.views.vertical_flip = 0.5  # probability
    config.views.affine = 0.7  # probability of rotation, translation and scale together
    config.views.rotation = 20.0  # degrees, either way
    config.views.translation = 0.1  # of the picture's side, either way
    config.views.scale_low = 0.8
    config.views.scale_high = 1.2

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adamw or sgd
    config.optim.learning_rate = 1e-4  # at the start of the cosine
    config.optim.warmup_steps = 0
    config.optim.weight_decay = 0.01
    config.optim.clip_norm = 0.0  # global norm of the gradient; 0: no clipping
    config.optim.accumulate = 1  # parts of a batch whose gradients are averaged
    config.optim.non_finite = "skip"  # a loss or gradient that is not finite: skip or abort

    config.log_every = 50  # steps
    config.eval_every = 0  # steps; 0: once an epoch
    config.patience = 0  # evaluations without a better validation Dice; 0: no early stop
    config.final_test = True  # evaluate the best checkpoint on the test split at the end
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """A run of a minute on a CPU over synthetic pictures, with the rest of `config` kept."""
    config.name += "_smoke"
    config.data.name, config.data.source, config.data.layout = "synthetic", "", ""
    config.data.num_examples = ConfigDict({"train": 32, "val": 8, "test": 8})
    config.model.image_size, config.model.width, config.model.num_levels = 56, 4, 3
    config.batch_size, config.num_steps, config.eval_every = 8, 8, 4
    config.optim.warmup_steps, config.log_every = 0, 2
    return config


def finish(config: ConfigDict, variant: str | None) -> ConfigDict:
    """The configuration itself, or its smoke variant; for pages without other variants."""
    if variant == "smoke":
        return smoke(config)
    if variant:
        raise unknown_variant(variant, ("smoke",))
    return config


def unknown_variant(variant: str, known: tuple[str, ...]) -> ValueError:
    """The error for a variant that a configuration does not have."""
    return ValueError(f"no variant {variant!r}; the variants are {', '.join(known)}")
