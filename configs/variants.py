"""Methods that apply to every experiment: `--config qata:small,full`.

Each method is a function that sets fields of a config. The method is applied first, whatever the
order of the names, so that the variants of an experiment, such as its size, override it.
"""

from collections.abc import Callable

from ml_collections import ConfigDict


def published(config: ConfigDict) -> None:
    """The published network and training: the base config."""


def full(config: ConfigDict) -> None:
    """The method as described in the paper: fusion at all levels, the weak view as target."""
    config.model.bmf.levels = "all"
    config.model.bmf.zero_init = True
    config.model.bmf.level_text_dropout = 0.5
    config.model.text.pooling = "masked"
    config.model.text.dropout = 0.1
    config.loss.views = "both"
    config.loss.iac_learner = "strong"
    config.loss.cycle_distance = "l2"
    _weak_views(config)
    config.views.strong_statistics = False
    config.views.strong.photometric = False
    config.views.strong.noise = 0.1
    config.views.strong.contrast = 0.3
    config.views.strong.elastic = 0.01
    config.views.strong.cutmix = 0.5
    _schedule(config)


def semi(config: ConfigDict) -> None:
    """`full`, plus the training images outside the label fraction, without masks."""
    full(config)
    config.data.unlabelled = "rest"
    config.batch_size *= 2  # the labelled images of the other methods, and as many unlabelled
    config.loss.views = "one"
    config.loss.pseudo_labels = 1.0
    config.loss.confidence = 0.8
    config.loss.ramp_steps = 200
    config.optim.ema_decay = 0.99


def unet(config: ConfigDict) -> None:
    """The image-only U-Net, without text."""
    _plain(config)
    config.model.pseudo_image = False


def ef_unet(config: ConfigDict) -> None:
    """Early fusion (arXiv 2510.12482): only the pseudo-image, generated from the prompt."""
    _plain(config)


def one_way(config: ConfigDict) -> None:
    """Text-to-vision fusion at all levels and the pseudo-image, no vision-to-text refinement."""
    _plain(config)
    config.model.bmf.levels = "all"
    config.model.bmf.text_to_vision = True


def no_bmf(config: ConfigDict) -> None:
    """`full` without fusion in either direction, at the input and at the levels."""
    full(config)
    config.model.bmf.vision_to_text = False
    config.model.bmf.text_to_vision = False
    config.model.bmf.levels = ""
    config.model.bmf.level_text_dropout = 0.0


def no_iac(config: ConfigDict) -> None:
    """`full` without the consistency loss; the strong view is still supervised."""
    full(config)
    config.loss.iac = 0.0


def no_cycle(config: ConfigDict) -> None:
    """`full` without the cycle loss."""
    full(config)
    config.loss.cycle = 0.0


def no_generator(config: ConfigDict) -> None:
    """`full` without the pseudo-image, and therefore without the generator and cycle losses."""
    full(config)
    config.model.pseudo_image = False
    config.model.bmf.level_text_dropout = 0.0
    config.loss.gen = config.loss.cycle = 0.0


def _plain(config: ConfigDict) -> None:
    """Supervised training on the weak view, without fusion."""
    config.model.bmf.vision_to_text = False
    config.model.bmf.text_to_vision = False
    config.model.bmf.levels = ""
    config.loss.gen = config.loss.iac = config.loss.cycle = 0.0
    _weak_views(config)
    _schedule(config)


def _schedule(config: ConfigDict) -> None:
    """The schedule of `full` and its baselines, so that they take the same number of steps."""
    # Keeps the value of the experiment.
    config.optim.warmup_steps = config.optim.warmup_steps or 1000
    config.num_epochs = 200


def _weak_views(config: ConfigDict) -> None:
    config.views.geometry_first = True
    config.views.vertical_flip = 0.0
    config.views.affine = 1.0
    config.views.rotation = 10.0
    config.views.translation = 0.0
    config.views.scale_low = config.views.scale_high = 1.0


METHODS: dict[str, Callable[[ConfigDict], None]] = {
    function.__name__: function
    for function in (
        published,
        full,
        semi,
        unet,
        ef_unet,
        one_way,
        no_bmf,
        no_iac,
        no_cycle,
        no_generator,
    )
}
