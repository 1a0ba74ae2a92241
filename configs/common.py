"""Every field there is, with its unit and the published default."""

from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from biclip_jax.configs import variants


def base() -> ConfigDict:
    """The `published` BiCLIP at full size, without a data set."""
    config = ConfigDict()
    config.name = "biclip"
    config.seed = 0  # of parameters, shuffling and augmentation
    config.ensemble = 1  # models trained together, with the seeds seed, seed + 1, ...
    config.batch_size = 16  # pictures a step, over all devices
    config.num_epochs = 150
    config.num_steps = 0  # above 0: takes the place of num_epochs
    config.data = _data()
    config.model = _model()
    config.loss = _loss()
    config.views = _views()
    config.optim = _optim()
    config.parallel = _parallel()
    config.log_every = 50  # steps
    config.eval_every = 0  # steps; 0: the most of an epoch, validation's batches, and 50
    config.patience = 0  # evaluations without a better validation Dice; 0: no early stop
    config.final_test = True  # evaluate the best checkpoint on the test split at the end
    return config


def _data() -> ConfigDict:
    """What is trained on."""
    data = ConfigDict()
    data.name = "folder"  # synthetic, qata_cov19, mosmed_plus, kvasir_seg, clinicdb, folder
    data.source = ""  # folder on disk in one of the known layouts
    data.layout = ""  # lvit, languide, medclipseg, medvlsm, csv; empty: look and see
    data.prompt = ""  # p0..p9 of the medvlsm layout; empty: the last that is not empty
    data.percent = 100  # 10, 25, 50: published subset of train and val, medclipseg layout alone
    data.resize = "antialiased"  # opencv: bilinear without antialiasing, nearest for masks
    data.cache_dir = ""  # where prepared sets go; empty: the user's cache folder
    data.in_memory = True  # decoded pictures stay in host memory
    data.on_device = False  # the training split lies on the device, and no batch is sent
    data.steps_per_call = 50  # at most, in one program, where data.on_device; on a CPU 1
    data.text_condition = "original"  # "empty" trains and evaluates with empty sentences
    data.label_fraction = 1.0  # share of the training pictures, in whole patients
    data.label_seed = 0  # of the order in which patients join the share
    data.half_mix = 0  # pictures of two halves for each labelled one, see data/halves.py
    data.unlabelled = ""  # trained on without masks: rest (of the pictures), or a folder
    data.teachers = ""  # runs with commas, whose mean answer masks the unlabelled pictures
    data.teacher_flip_tta = False  # they answer mirror images, too, with the mirrored sentences
    data.unlabelled_ratio = 1.0  # unlabelled pictures for each labelled one of a batch
    data.num_examples = ConfigDict({"train": 0, "val": 0, "test": 0})  # synthetic only
    return data


def _model() -> ConfigDict:
    """The network."""
    model = ConfigDict()
    model.kind = "biclip"  # configs/medclipseg.py has the other one
    model.image_size = 224  # pixels; 112, 224, 448 with five levels
    model.width = 64  # channels of the U-Net's first level; scales every encoder
    model.num_levels = 5  # of the U-Net, the bottleneck included
    model.dtype = "float32"  # of the computation: float32 or bfloat16
    model.norm = "batch"  # of the U-Net: batch, or group (no statistics of the batch)
    model.remat = False  # true: less memory, more time: the U-Net's blocks are computed twice
    model.pseudo_image = True  # the sentence becomes a picture, the U-Net's second input
    model.pseudo_contrast = False  # whether it begins with the sentence's contrast, or even grey
    model.bmf = ConfigDict()  # bidirectional multimodal fusion
    model.bmf.vision_to_text = True  # the picture refines the sentence
    model.bmf.text_to_vision = True  # the sentence modulates the levels' features
    model.bmf.levels = ""  # blocks beside the input: all, encoder, bottleneck, decoder_1 ...
    model.bmf.hidden = 256  # features of the levels' refiners
    model.bmf.zero_init = False  # whether the refiners begin at zero: the sentence as it is
    model.bmf.level_text_dropout = 0.0  # probability that the levels get no sentence in training
    model.image = ConfigDict()  # the encoder whose embedding refines the sentence
    model.image.encoder = "cnn"  # trained with the rest; clip_vit_b16, clip_rn50: a tower
    model.image.weights = ""  # of a tower: a folder that biclip_jax.convert clip wrote
    model.image.trainable = False  # of a tower
    model.text = ConfigDict()
    model.text.encoder = "scratch"  # trained on the captions' own words; bert, clip: a tower
    model.text.weights = ""  # of bert and clip: a folder that biclip_jax.convert wrote
    model.text.trainable = False  # bert, clip: false computes each sentence's vector once
    model.text.pooling = "all_tokens"  # bert, clip: all_tokens (published), masked, embedding
    model.text.width = 128  # this and the next two: of the scratch encoder
    model.text.num_layers = 2
    model.text.num_heads = 4
    model.text.max_length = 32  # tokens
    model.text.dropout = 0.0  # probability; above 0 an empty sentence has its own vector
    return model


def _loss() -> ConfigDict:
    """The parts of the loss."""
    loss = ConfigDict()
    loss.gen = 0.1  # weight of the generator's L1
    loss.iac = 0.05  # weight of the consistency between views
    loss.cycle = 0.07  # weight of the cycle
    loss.double_sigmoid = False  # true: repeats a slip of the published training code
    loss.views = "weak"  # that learn from masks: weak, both; one: strong where there is no mask
    loss.iac_learner = "weak"  # view that gets the gradient of L_IAC: weak, strong, both
    loss.iac_blocks = "decoder_0"  # U-Net blocks compared: decoder_0,decoder_1 ...; decoder
    loss.cycle_distance = "l1"  # l1 or l2
    loss.pseudo_labels = 0.0  # weight of FixMatch's pseudo-labels, on unlabelled pictures
    loss.confidence = 0.95  # probability from which a pseudo-label counts; data.teachers' all do
    loss.mean_teacher = 0.0  # weight of the squared error to the averaged model, likewise
    loss.ramp_steps = 0  # steps until both have their full weight
    return loss


def _views() -> ConfigDict:
    """How pictures are changed in training."""
    views = ConfigDict()
    views.horizontal_flip = 0.5  # probability
    views.vertical_flip = 0.5  # probability
    views.affine = 0.7  # probability of rotation, translation and scale together
    views.rotation = 20.0  # degrees, either way
    views.translation = 0.1  # of the picture's side, either way
    views.scale_low = 0.8
    views.scale_high = 1.2
    views.brightness = 0.0  # largest change, either way
    views.contrast = 0.0  # largest change, as a share, either way
    views.integer_degrees = (
        False  # true: turns to the nearest pixel alone, as MedCLIPSeg's code does
    )
    views.geometry_first = False  # true: before the fusion; a flip then swaps the sentence
    views.strong_statistics = True  # BatchNorm's running statistics take the strong view, too
    views.strong = ConfigDict()  # what the strong view adds
    views.strong.photometric = True  # gamma, noise, brightness, contrast, blur as published
    views.strong.noise = 0.0  # largest standard deviation
    views.strong.brightness = 0.0  # largest change, either way
    views.strong.contrast = 0.0  # largest change, as a share, either way
    views.strong.elastic = 0.0  # standard deviation of the shifts, of the picture's side
    views.strong.cutmix = 0.0  # probability that a pair of pictures exchanges a box
    return views


def _optim() -> ConfigDict:
    """How parameters move."""
    optim = ConfigDict()
    optim.name = "adamw"  # adamw or sgd
    optim.learning_rate = 1e-4  # at the start of the cosine
    optim.encoder_learning_rate = 0.0  # of trained towers; 0: learning_rate
    optim.final_learning_rate = 0.0  # at the end of the cosine
    optim.lr_update = "step"  # along the cosine at every step, or once an epoch
    optim.warmup_steps = 0
    optim.weight_decay = 0.01
    optim.clip_norm = 0.0  # global norm of the gradient; 0: no clipping
    optim.accumulate = 1  # parts of a batch whose gradients are averaged
    optim.ema_decay = 0.0  # above 0: averages the parameters; the average is what is kept
    optim.non_finite = "skip"  # a loss or gradient that is not finite: skip or abort
    return optim


def _parallel() -> ConfigDict:
    """How the devices share the work; a run may go on under other values."""
    parallel = ConfigDict()
    parallel.mode = "pmap"  # pmap, or mesh: jit over a mesh of all devices
    parallel.shard = ""  # mesh: what is cut over the devices: nothing, optimizer, or all
    return parallel


def smoke(config: ConfigDict) -> None:
    """A run of a minute on a CPU over synthetic pictures, with the rest of `config` kept."""
    config.data.name, config.data.source, config.data.layout = "synthetic", "", ""
    config.data.num_examples = ConfigDict({"train": 32, "val": 8, "test": 8})
    config.model.image_size, config.model.width, config.model.num_levels = 56, 4, 3
    config.batch_size, config.num_steps, config.eval_every = 8, 8, 4
    config.optim.warmup_steps, config.log_every = 0, 2


def small(config: ConfigDict) -> None:
    """A size for a CPU: 112 px, a sixteenth of the U-Net's weights, 2500 steps.

    Geometry and light are the same for every method: the published ranges, for every picture. More
    than the flip and rotation that `full` is described with: few pictures are soon known by heart.
    """
    config.model.image_size = 112
    config.model.width = 16
    config.num_steps = 2500
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 100
    config.views.vertical_flip = 0.0  # no sentence follows it
    config.views.affine = 1.0
    config.views.rotation, config.views.translation = 20.0, 0.1
    config.views.scale_low, config.views.scale_high = 0.8, 1.2
    config.views.brightness, config.views.contrast = 0.2, 0.3


def finish(
    config: ConfigDict,
    variant: str | None,
    own: Mapping[str, Callable[[ConfigDict], None]] | None = None,
) -> ConfigDict:
    """The configuration with variants applied to it: a method, then others as they are named.

    Args:
      config: of a page.
      variant: comma-separated; each adds its name to the configuration's.
      own: variants of the page, beside `small`, `smoke` and those of `configs/variants.py`.

    Raises:
      ValueError: an unknown variant.
    """
    names = variant.split(",") if variant else []
    methods = [name for name in names if name in variants.METHODS]
    if len(methods) > 1:
        raise ValueError(f"{', '.join(methods)} are whole methods; name one of them")
    known = {"small": small, "smoke": smoke, **variants.METHODS, **(own or {})}
    return apply(config, variant, known, methods)


def apply(
    config: ConfigDict,
    variant: str | None,
    known: Mapping[str, Callable[[ConfigDict], None]],
    first: Sequence[str] = (),
) -> ConfigDict:
    """The configuration with variants applied in the order of their names, and named after them.

    Args:
      config: of a page.
      variant: comma-separated; each adds its name to the configuration's.
      known: {name: function that changes a configuration}.
      first: of the variants, those that are applied before the others.

    Raises:
      ValueError: an unknown variant.
    """
    names = variant.split(",") if variant else []
    for name in names:
        if name not in known:
            raise ValueError(f"no variant {name!r}; the variants are {', '.join(known)}")
    for name in sorted(names, key=lambda name: name not in first):
        known[name](config)
    config.name = "_".join([config.name, *names])
    return config
