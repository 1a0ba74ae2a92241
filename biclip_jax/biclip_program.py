"""BiCLIP out of a configuration: its towers, sentences, variables and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from biclip_jax import image_towers, parallel, sentences
from biclip_jax.assembly import Assembly, member_keys
from biclip_jax.errors import UserError
from biclip_jax.models import biclip
from biclip_jax.models.text import PooledTower
from biclip_jax.training import objective
from biclip_jax.weights import folder as model_folder


class Towers(NamedTuple):
    """Pretrained towers, where configured."""

    text: sentences.TextTower | None = None
    image: image_towers.OpenedTower | None = None

    @property
    def identities(self) -> dict[str, str]:
        """{section of `model`: SHA-256 of its tower, empty for none}."""
        return {name: t.identity if t else "" for name, t in self._asdict().items()}


def open_towers(config: ConfigDict) -> Towers:
    """The towers that the fields of `model.text` and `model.image` name.

    Raises:
      UserError: a tower that does not open; pictures of a size that the U-Net does not take, which
        is better known before they are prepared.
    """
    fields, dtype = config.model, config.model.dtype
    try:
        biclip.check_size(fields.image_size, fields.num_levels, fields.pseudo_image)
    except ValueError as error:
        raise UserError(f"--config.model.{error}") from error
    return Towers(
        sentences.open_configured(config.model.text.to_dict(), dtype),
        image_towers.open_configured(config.model.image.to_dict(), dtype),
    )


def link_towers(towers: Towers, folder: Path) -> None:
    """Puts the text tower inside a model folder."""
    if towers.text:
        model_folder.link(towers.text.folder, folder / sentences.TEXT_ENCODER)


def read_sentences(
    config: ConfigDict,
    texts: Mapping[str, Sequence[str]],
    towers: Towers,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> sentences.Sentences:
    """The sentences of a run; see `sentences.read`."""
    return sentences.read(config.model.text.to_dict(), texts, towers.text, folder, log)


def assemble(
    config: ConfigDict, spoken: sentences.Sentences, towers: Towers, labelled: float
) -> Assembly:
    """The model, its first variables and its loss.

    Args:
      config: resolved.
      spoken: the sentences.
      towers: pretrained, where configured.
      labelled: share of a batch that has masks.

    Raises:
      ValueError: fields or sizes that do not go together.
    """
    if config.ensemble > 1 and config.model.text.trainable:
        raise ValueError("an ensemble shares its text tower; set model.text.trainable to false")
    model, members = build_model(config, spoken, towers.text, towers.image)
    recipe = objective.make_recipe(config.to_dict(), labelled)
    keeps_tower = towers.image is not None and not config.model.image.trainable
    frozen = {"image_tower"} & members[0]["params"].keys() if keeps_tower else ()
    return Assembly(
        model=model,
        members=members,
        objective=partial(objective.objective, model=model, recipe=recipe),
        frozen=frozen,
        linked=(),
        described=describe(config, spoken, towers.image),
        average_statistics=not recipe.has_statistics_of_average,
    )


def model_fields(config: ConfigDict) -> dict[str, Any]:
    """What `models.biclip.build` is given: `model`, and the heads that the losses need."""
    blocks = biclip.named_blocks(config.loss.iac_blocks, config.model.num_levels)
    if not blocks or not all(block.startswith("decoder") for block in blocks):
        raise ValueError(f"loss.iac_blocks is {config.loss.iac_blocks!r}; expected decoder blocks")
    fields = config.model.to_dict()
    refines = config.model.bmf.vision_to_text
    if config.model.image.encoder != "cnn" and not refines:
        raise ValueError("model.image.encoder is a tower, but bmf.vision_to_text is off; set cnn")
    if config.model.pseudo_contrast and not config.model.pseudo_image:
        raise ValueError(
            "model.pseudo_contrast is of the pseudo-image, and model.pseudo_image is false; "
            "leave it false"
        )
    heads = [head for head in biclip.HEADS if config.loss[head] > 0]
    return fields | {"heads": heads, "iac_blocks": list(blocks)}


def build_model(
    config: ConfigDict,
    spoken: sentences.Sentences,
    tower: sentences.TextTower | None,
    image_tower: image_towers.OpenedTower | None,
) -> tuple[biclip.BiCLIP, list[dict[str, Any]]]:
    """The model as it is trained, and each member's first variables; towers begin as converted.

    Raises:
      ValueError: sizes that do not go together.
    """
    make = partial(
        biclip.build,
        model_fields(config),
        vocab_size=spoken.tokenizer.get_vocab_size(),
        image_tower=image_tower and image_tower.module,
        axis_name=parallel.axis_of(config.parallel.mode),
    )
    model = make()
    trained = tower if tower and config.model.text.trainable else None
    if trained:
        num_features = PooledTower(trained.module, config.model.text.pooling).num_features
        one = {"text_features": jnp.zeros((1, num_features))}
    else:
        one = {k: jnp.asarray(v[:1]) for k, v in spoken.fields["train"].items()}
    text = biclip.text_inputs(one)
    members = [biclip.init(model, key, text) for key in member_keys(config, "params")]
    for variables in members:
        if trained and model.uses_text:
            variables["params"]["text_encoder"] = {"tower": trained.params}
        # Named after the model's field; absent where nothing refines the sentence.
        if image_tower and "image_tower" in variables["params"]:
            variables["params"]["image_tower"] = image_tower.params
            if image_tower.batch_stats:
                variables["batch_stats"]["image_tower"] = image_tower.batch_stats
    return make(tower=trained.module) if trained else model, members


def describe(
    config: ConfigDict, spoken: sentences.Sentences, image_tower: image_towers.OpenedTower | None
) -> dict[str, Any]:
    """What a model folder must say for `inference.load_model` to build this model again."""
    fields = model_fields(config)
    for part in ("text", "image"):
        fields[part] = {**fields[part], "weights": ""}  # a path here; the tower lies inside
    return {
        "kind": "biclip",
        "model": fields,
        "vocab_size": spoken.tokenizer.get_vocab_size(),
        "tower": spoken.tower,
        "image_tower": image_tower.fields if image_tower else {},
        "ensemble": config.ensemble,
        "resize": config.data.resize,
        "name": config.name,
        "data": config.data.name,
    }
