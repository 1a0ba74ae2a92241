"""All config fields, with units and published defaults."""

from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from biclip_jax.configs import variants


def base() -> ConfigDict:
    """Returns the `published` BiCLIP config at full size, without a dataset."""
    config = ConfigDict()
    config.name = "biclip"
    config.seed = 0  # of initialization, shuffling and augmentation
    config.ensemble = 1  # models trained jointly, with seeds seed, seed + 1, ...
    config.batch_size = 16  # images per step, over all devices
    config.num_epochs = 150
    config.num_steps = 0  # above 0: overrides num_epochs
    config.data = _data()
    config.model = _model()
    config.loss = _loss()
    config.views = _views()
    config.optim = _optim()
    config.parallel = _parallel()
    config.log_every = 50  # steps
    config.eval_every = 0  # steps; 0: max(steps of an epoch, validation batches, 50)
    config.patience = 0  # evaluations without a better validation Dice before stopping; 0: off
    config.final_test = True  # evaluate the best checkpoint on the test split at the end
    return config


def _data() -> ConfigDict:
    """The training data."""
    data = ConfigDict()
    data.name = "folder"  # synthetic, qata_cov19, mosmed_plus, kvasir_seg, clinicdb, folder
    data.source = ""  # folder of the dataset, see docs/data.md
    data.layout = ""  # lvit, languide, medclipseg, medvlsm, csv; empty: detected
    data.prompt = ""  # p0 to p9 of the medvlsm layout; empty: the last non-empty one
    data.percent = 100  # 10, 25, 50: published subsets of train and val (medclipseg layout)
    data.resize = "antialiased"  # opencv: bilinear without antialiasing, nearest for masks
    data.cache_dir = ""  # folder of prepared datasets; empty: the user's cache folder
    data.in_memory = True  # keep decoded images in host memory
    data.on_device = False  # keep the training split in device memory
    data.steps_per_call = 50  # at most, in one program if data.on_device; 1 on CPUs
    data.text_condition = "original"  # "empty" trains and evaluates with empty prompts
    data.label_fraction = 1.0  # share of the training images, in whole patients
    data.label_seed = 0  # of the order in which patients are added to the labelled set
    data.half_mix = 0  # mixed samples per labelled image, see data/half_mix.py
    data.unlabelled = ""  # images trained on without masks: rest (of the split) or a folder
    data.teachers = ""  # comma-separated runs whose mean prediction gives pseudo-labels
    data.teacher_flip_tta = False  # teachers also predict flipped images with swapped prompts
    data.unlabelled_ratio = 1.0  # unlabelled images per labelled image of a batch
    data.num_examples = ConfigDict({"train": 0, "val": 0, "test": 0})  # synthetic only
    return data


def _model() -> ConfigDict:
    """The network."""
    model = ConfigDict()
    model.kind = "biclip"  # biclip; configs/medclipseg.py has the fields of medclipseg
    model.image_size = 224  # pixels; 112, 224, 448 with five levels
    model.width = 64  # channels of the first U-Net level; scales every encoder
    model.num_levels = 5  # of the U-Net, including the bottleneck
    model.dtype = "float32"  # dtype of the computation: float32 or bfloat16
    model.norm = "batch"  # of the U-Net: batch or group
    model.remat = False  # true: recompute U-Net blocks in the backward pass to save memory
    model.pseudo_image = True  # generate a pseudo-image from the text as second U-Net input
    model.pseudo_contrast = False  # true: text-dependent contrast at initialization, not constant
    model.bmf = ConfigDict()  # bidirectional multimodal fusion
    model.bmf.vision_to_text = True  # the image refines the text embedding
    model.bmf.text_to_vision = True  # the text modulates the image features
    model.bmf.levels = ""  # blocks besides the input: all, encoder, bottleneck, decoder_1 ...
    model.bmf.hidden = 256  # hidden features of the refiners of the levels
    model.bmf.zero_init = False  # zero-initialize the refiners: text embedding unchanged at start
    model.bmf.level_text_dropout = 0.0  # probability of no text at the levels in training
    model.image = ConfigDict()  # the encoder whose embedding refines the text
    model.image.encoder = "cnn"  # cnn (trained from scratch), clip_vit_b16 or clip_rn50
    model.image.weights = ""  # of a CLIP encoder: output folder of `biclip convert clip`
    model.image.trainable = False  # of a CLIP encoder
    model.text = ConfigDict()
    model.text.encoder = "scratch"  # scratch (vocabulary of the training captions), bert or clip
    model.text.weights = ""  # of bert and clip: output folder of `biclip convert`
    model.text.trainable = False  # bert, clip: false computes each text embedding once
    model.text.pooling = "all_tokens"  # bert, clip: all_tokens (published), masked, embedding
    model.text.width = 128  # this and the next two: of the scratch encoder
    model.text.num_layers = 2
    model.text.num_heads = 4
    model.text.max_length = 32  # tokens
    model.text.dropout = 0.0  # probability; above 0, empty prompts get a learned embedding
    return model


def _loss() -> ConfigDict:
    """The loss terms."""
    loss = ConfigDict()
    loss.gen = 0.1  # weight of the L1 loss of the generator
    loss.iac = 0.05  # weight of image augmentation consistency (IAC)
    loss.cycle = 0.07  # weight of the cycle loss
    loss.double_sigmoid = False  # true: reproduces a bug of the published training code
    loss.views = "weak"  # supervised views: weak or both; one: strong only without mask
    loss.iac_learner = "weak"  # view that receives the IAC gradient: weak, strong, both
    loss.iac_blocks = "decoder_0"  # compared U-Net blocks: decoder_0,decoder_1 ...; decoder
    loss.cycle_distance = "l1"  # l1 or l2
    loss.pseudo_labels = 0.0  # weight of FixMatch pseudo-labels on unlabelled images
    loss.confidence = 0.95  # pseudo-label threshold; not used with data.teachers
    loss.mean_teacher = 0.0  # weight of the squared error to the EMA model, on unlabelled images
    loss.ramp_steps = 0  # steps until both weights are reached
    return loss


def _views() -> ConfigDict:
    """Augmentation: the weak view and the strong view."""
    views = ConfigDict()
    views.horizontal_flip = 0.5  # probability
    views.vertical_flip = 0.5  # probability
    views.affine = 0.7  # probability of the joint rotation, translation and scaling
    views.rotation = 20.0  # degrees, in both directions
    views.translation = 0.1  # share of the image side, in both directions
    views.scale_low = 0.8
    views.scale_high = 1.2
    views.brightness = 0.0  # largest change, in both directions
    views.contrast = 0.0  # largest relative change, in both directions
    views.integer_degrees = False  # true: nearest-neighbor rotation, as the code of MedCLIPSeg
    views.geometry_first = False  # true: before the fusion, and a flip also swaps the prompt
    views.strong_statistics = True  # update BatchNorm running statistics on the strong view, too
    views.strong = ConfigDict()  # additional augmentation of the strong view
    views.strong.photometric = True  # gamma, noise, brightness, contrast, blur as published
    views.strong.noise = 0.0  # largest standard deviation
    views.strong.brightness = 0.0  # largest change, in both directions
    views.strong.contrast = 0.0  # largest relative change, in both directions
    views.strong.elastic = 0.0  # standard deviation of the displacement, share of the image side
    views.strong.cutmix = 0.0  # probability that a pair of images swaps a box
    return views


def _optim() -> ConfigDict:
    """The optimizer."""
    optim = ConfigDict()
    optim.name = "adamw"  # adamw or sgd
    optim.learning_rate = 1e-4  # at the start of the cosine
    optim.encoder_learning_rate = 0.0  # of trainable pretrained encoders; 0: learning_rate
    optim.final_learning_rate = 0.0  # at the end of the cosine
    optim.lr_update = "step"  # update of the schedule: step or epoch
    optim.warmup_steps = 0
    optim.weight_decay = 0.01
    optim.clip_norm = 0.0  # global norm of the gradient; 0: no clipping
    optim.accumulate = 1  # gradient accumulation: number of micro-batches per step
    optim.ema_decay = 0.0  # above 0: evaluate and save the exponential moving average
    optim.non_finite = "skip"  # on a non-finite loss or gradient: skip or abort
    return optim


def _parallel() -> ConfigDict:
    """Parallelism; a run can resume with other values."""
    parallel = ConfigDict()
    parallel.mode = "pmap"  # pmap, or mesh (jit over a mesh of all devices)
    parallel.shard = ""  # mesh: sharded state: empty (none), optimizer or all
    return parallel


def smoke(config: ConfigDict) -> None:
    """One minute on a CPU with synthetic images; keeps all other fields of `config`."""
    config.data.name, config.data.source, config.data.layout = "synthetic", "", ""
    config.data.num_examples = ConfigDict({"train": 32, "val": 8, "test": 8})
    config.model.image_size, config.model.width, config.model.num_levels = 56, 4, 3
    config.batch_size, config.num_steps, config.eval_every = 8, 8, 4
    config.optim.warmup_steps, config.log_every = 0, 2


def small(config: ConfigDict) -> None:
    """A size for CPUs: 112 px, a sixteenth of the U-Net parameters, 2500 steps.

    All methods use the same geometric and photometric augmentation: the published ranges, on every
    image. This is more than the flip and rotation of `full`, because small training sets overfit.
    """
    config.model.image_size = 112
    config.model.width = 16
    config.num_steps = 2500
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 100
    config.views.vertical_flip = 0.0  # prompts are not adapted to it
    config.views.affine = 1.0
    config.views.rotation, config.views.translation = 20.0, 0.1
    config.views.scale_low, config.views.scale_high = 0.8, 1.2
    config.views.brightness, config.views.contrast = 0.2, 0.3


def finish(
    config: ConfigDict,
    variant: str | None,
    extra: Mapping[str, Callable[[ConfigDict], None]] | None = None,
) -> ConfigDict:
    """Applies variants to a config: first the method, then the others in the given order.

    Args:
      config: Config of an experiment.
      variant: Comma-separated names; each is appended to `config.name`.
      extra: Variants of this experiment, besides `small`, `smoke` and `variants.METHODS`.

    Raises:
      ValueError: A variant is unknown, or more than one is a method.
    """
    names = variant.split(",") if variant else []
    methods = [name for name in names if name in variants.METHODS]
    if len(methods) > 1:
        raise ValueError(
            f"variants {', '.join(methods)}: expected at most one method; remove the others"
        )
    known = {"small": small, "smoke": smoke, **variants.METHODS, **(extra or {})}
    return apply(config, variant, known, methods)


def apply(
    config: ConfigDict,
    variant: str | None,
    known: Mapping[str, Callable[[ConfigDict], None]],
    first: Sequence[str] = (),
) -> ConfigDict:
    """Applies variants in the given order and appends their names to `config.name`.

    Args:
      config: Config of an experiment.
      variant: Comma-separated names.
      known: {name: function that changes a config}.
      first: Variants to apply before the others.

    Raises:
      ValueError: A variant is unknown.
    """
    names = variant.split(",") if variant else []
    for name in names:
        if name not in known:
            raise ValueError(f"variant {name!r}: unknown; expected one of {', '.join(known)}")
    for name in sorted(names, key=lambda name: name not in first):
        known[name](config)
    config.name = "_".join([config.name, *names])
    return config
