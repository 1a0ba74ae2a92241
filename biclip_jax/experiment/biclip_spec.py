"""BiCLIP out of a configuration: its towers, sentences, variables and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from biclip_jax.core import distributed
from biclip_jax.core.errors import UserError
from biclip_jax.core.rng import member_keys
from biclip_jax.encoders import image as image_encoders
from biclip_jax.encoders import text as text_encoders
from biclip_jax.experiment.model_spec import ModelSpec
from biclip_jax.models import biclip
from biclip_jax.models.text import PooledTextEncoder
from biclip_jax.training.objectives import biclip as objective
from biclip_jax.weights import model_folder


class Encoders(NamedTuple):
    """Pretrained towers, where configured."""

    text: text_encoders.PretrainedTextEncoder | None = None
    image: image_encoders.PretrainedImageEncoder | None = None

    @property
    def identities(self) -> dict[str, str]:
        """{section of `model`: SHA-256 of its tower, empty for none}."""
        return {name: t.identity if t else "" for name, t in self._asdict().items()}


def open_encoders(config: ConfigDict) -> Encoders:
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
    return Encoders(
        text_encoders.open_configured(config.model.text.to_dict(), dtype),
        image_encoders.open_configured(config.model.image.to_dict(), dtype),
    )


def link_encoders(encoders: Encoders, folder: Path) -> None:
    """Puts the text tower inside a model folder."""
    if encoders.text:
        model_folder.link_folder(encoders.text.folder, folder / text_encoders.TEXT_ENCODER)


def encode_texts(
    config: ConfigDict,
    texts: Mapping[str, Sequence[str]],
    encoders: Encoders,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> text_encoders.EncodedText:
    """The sentences of a run; see `sentences.read`."""
    return text_encoders.encode_splits(
        config.model.text.to_dict(), texts, encoders.text, folder, log
    )


def make_spec(
    config: ConfigDict, encoded_text: text_encoders.EncodedText, encoders: Encoders, labelled: float
) -> ModelSpec:
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
    model, members = build_model(config, encoded_text, encoders.text, encoders.image)
    recipe = objective.make_recipe(config.to_dict(), labelled)
    is_frozen = encoders.image is not None and not config.model.image.trainable
    frozen = {"pretrained_image_encoder"} & members[0]["params"].keys() if is_frozen else ()
    return ModelSpec(
        model=model,
        members=members,
        objective=partial(objective.objective, model=model, recipe=recipe),
        frozen=frozen,
        linked=(),
        described=model_description(config, encoded_text, encoders.image),
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
    encoded_text: text_encoders.EncodedText,
    text_encoder: text_encoders.PretrainedTextEncoder | None,
    image_encoder: image_encoders.PretrainedImageEncoder | None,
) -> tuple[biclip.BiCLIP, list[dict[str, Any]]]:
    """The model as it is trained, and each member's first variables; towers begin as converted.

    Raises:
      ValueError: sizes that do not go together.
    """
    make = partial(
        biclip.build,
        model_fields(config),
        vocab_size=encoded_text.tokenizer.get_vocab_size(),
        pretrained_image_encoder=image_encoder and image_encoder.module,
        axis_name=distributed.axis_name_of(config.parallel.mode),
    )
    model = make()
    trained = text_encoder if text_encoder and config.model.text.trainable else None
    if trained:
        num_features = PooledTextEncoder(trained.module, config.model.text.pooling).num_features
        one = {"text_features": jnp.zeros((1, num_features))}
    else:
        one = {k: jnp.asarray(v[:1]) for k, v in encoded_text.fields["train"].items()}
    text = biclip.text_inputs(one)
    members = [biclip.init(model, key, text) for key in member_keys(config, "params")]
    for variables in members:
        if trained and model.uses_text:
            variables["params"]["text_encoder"] = {"pretrained": trained.params}
        # Named after the model's field; absent where nothing refines the sentence.
        if image_encoder and "pretrained_image_encoder" in variables["params"]:
            variables["params"]["pretrained_image_encoder"] = image_encoder.params
            if image_encoder.batch_stats:
                variables["batch_stats"]["pretrained_image_encoder"] = image_encoder.batch_stats
    return make(pretrained_text_encoder=trained.module) if trained else model, members


def model_description(
    config: ConfigDict,
    encoded_text: text_encoders.EncodedText,
    image_encoder: image_encoders.PretrainedImageEncoder | None,
) -> dict[str, Any]:
    """What a model folder must say for `inference.load_model` to build this model again."""
    fields = model_fields(config)
    for part in ("text", "image"):
        fields[part] = {**fields[part], "weights": ""}  # a path here; the tower lies inside
    return {
        "kind": "biclip",
        "model": fields,
        "vocab_size": encoded_text.tokenizer.get_vocab_size(),
        "text_encoder_sha256": encoded_text.encoder_sha256,
        "image_encoder": image_encoder.fields if image_encoder else {},
        "ensemble": config.ensemble,
        "resize": config.data.resize,
        "name": config.name,
        "data": config.data.name,
    }
