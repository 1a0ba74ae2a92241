"""Methods that every experiment can be run with: `--config qata:small,full`.

Each is a function that sets fields of a configuration. A method comes first, whatever
the order of the names: what a page's own variants set, such as the size, stands.
"""

from collections.abc import Callable

from ml_collections import ConfigDict


def published(config: ConfigDict) -> None:
    """The network and the training as published: the base itself."""


def full(config: ConfigDict) -> None:
    """The method as described: fusion at every level, both views learn, the weak one teaches."""
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
    """`full`, and the training pictures outside the labelled share with it, without masks."""
    full(config)
    config.data.unlabelled = "rest"
    config.batch_size *= 2  # as many labelled pictures a step as the others, and as many without
    config.loss.views = "one"
    config.loss.pseudo_labels = 1.0
    config.loss.confidence = 0.8
    config.loss.ramp_steps = 200
    config.optim.ema_decay = 0.99


def unet(config: ConfigDict) -> None:
    """The image-only U-Net: no sentence anywhere."""
    _plain(config)
    config.model.pseudo_image = False


def ef_unet(config: ConfigDict) -> None:
    """Early fusion (arXiv 2510.12482): the sentence as a second picture, and nothing else."""
    _plain(config)


def one_way(config: ConfigDict) -> None:
    """The sentence modulates every level and makes the pseudo-image; nothing comes back to it."""
    _plain(config)
    config.model.bmf.levels = "all"
    config.model.bmf.text_to_vision = True


def no_bmf(config: ConfigDict) -> None:
    """`full` without the fusion: neither direction, at the input or at the levels."""
    full(config)
    config.model.bmf.vision_to_text = False
    config.model.bmf.text_to_vision = False
    config.model.bmf.levels = ""
    config.model.bmf.level_text_dropout = 0.0


def no_iac(config: ConfigDict) -> None:
    """`full` without the consistency between views; the strong view still learns from masks."""
    full(config)
    config.loss.iac = 0.0


def no_cycle(config: ConfigDict) -> None:
    """`full` without the cycle loss."""
    full(config)
    config.loss.cycle = 0.0


def no_generator(config: ConfigDict) -> None:
    """`full` without the pseudo-image, and so without its loss and the cycle."""
    full(config)
    config.model.pseudo_image = False
    config.model.bmf.level_text_dropout = 0.0
    config.loss.gen = config.loss.cycle = 0.0


def _plain(config: ConfigDict) -> None:
    """Supervised training on the weak view alone, no part of the fusion."""
    config.model.bmf.vision_to_text = False
    config.model.bmf.text_to_vision = False
    config.model.bmf.levels = ""
    config.loss.gen = config.loss.iac = config.loss.cycle = 0.0
    _weak_views(config)
    _schedule(config)


def _schedule(config: ConfigDict) -> None:
    """The same for `full` and its rivals, so that they take the same number of steps."""
    config.optim.warmup_steps = config.optim.warmup_steps or 1000  # a page's own stands
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
