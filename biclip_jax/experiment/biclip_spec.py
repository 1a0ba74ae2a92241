"""Builds BiCLIP from a config: encoders, encoded prompts, variables and loss."""

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
    """Pretrained encoders; None where the config names none."""

    text: text_encoders.PretrainedTextEncoder | None = None
    image: image_encoders.PretrainedImageEncoder | None = None

    @property
    def identities(self) -> dict[str, str]:
        """Returns {section of `model`: SHA-256 of its encoder, "" for none}."""
        return {name: e.identity if e else "" for name, e in self._asdict().items()}


def open_encoders(config: ConfigDict) -> Encoders:
    """Opens the encoders that `model.text` and `model.image` name.

    Raises:
      UserError: An encoder cannot be opened, or the U-Net does not support the image size (checked
        here, before the images are prepared).
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
    """Links the text encoder into a model folder."""
    if encoders.text:
        model_folder.link_folder(encoders.text.folder, folder / text_encoders.TEXT_ENCODER)


def encode_texts(
    config: ConfigDict,
    texts: Mapping[str, Sequence[str]],
    encoders: Encoders,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> text_encoders.EncodedText:
    """Encodes the prompts of a run; see `encoders.text.encode_splits`."""
    return text_encoders.encode_splits(
        config.model.text.to_dict(), texts, encoders.text, folder, log
    )


def make_spec(
    config: ConfigDict,
    encoded_text: text_encoders.EncodedText,
    encoders: Encoders,
    labelled_batch_fraction: float,
) -> ModelSpec:
    """Builds the model, its initial variables and its loss.

    Args:
      config: Resolved config.
      encoded_text: Encoded prompts of the run.
      encoders: Pretrained encoders of the config.
      labelled_batch_fraction: Fraction of the rows of a batch that have masks.

    Raises:
      ValueError: Incompatible config fields or sizes.
    """
    if config.ensemble > 1 and config.model.text.trainable:
        raise ValueError("an ensemble shares its text encoder; set model.text.trainable to false")
    model, members = build_model(config, encoded_text, encoders.text, encoders.image)
    recipe = objective.make_recipe(config.to_dict(), labelled_batch_fraction)
    is_frozen = encoders.image is not None and not config.model.image.trainable
    frozen = {"pretrained_image_encoder"} & members[0]["params"].keys() if is_frozen else ()
    return ModelSpec(
        model=model,
        members=members,
        objective=partial(objective.objective, model=model, recipe=recipe),
        frozen=frozen,
        linked=(),
        model_config=describe_model(config, encoded_text, encoders.image),
        average_statistics=not recipe.has_statistics_of_average,
    )


def model_fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields of `models.biclip.build`: `model`, and the heads that the losses need."""
    blocks = biclip.named_blocks(config.loss.iac_blocks, config.model.num_levels)
    if not blocks or not all(block.startswith("decoder") for block in blocks):
        raise ValueError(f"loss.iac_blocks is {config.loss.iac_blocks!r}; expected decoder blocks")
    fields = config.model.to_dict()
    refines = config.model.bmf.vision_to_text
    if config.model.image.encoder != "cnn" and not refines:
        raise ValueError(
            "model.image.encoder is pretrained, but model.bmf.vision_to_text is off; set cnn"
        )
    if config.model.pseudo_contrast and not config.model.pseudo_image:
        raise ValueError(
            "model.pseudo_contrast initializes the generator, but model.pseudo_image is false; "
            "set model.pseudo_contrast to false"
        )
    heads = [head for head in biclip.HEADS if config.loss[head] > 0]
    return fields | {"heads": heads, "iac_blocks": list(blocks)}


def build_model(
    config: ConfigDict,
    encoded_text: text_encoders.EncodedText,
    text_encoder: text_encoders.PretrainedTextEncoder | None,
    image_encoder: image_encoders.PretrainedImageEncoder | None,
) -> tuple[biclip.BiCLIP, list[dict[str, Any]]]:
    """Builds the network and the initial variables of every member.

    Pretrained encoders start from their converted weights.

    Raises:
      ValueError: Incompatible sizes.
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
        example = {"text_features": jnp.zeros((1, num_features))}
    else:
        example = {k: jnp.asarray(v[:1]) for k, v in encoded_text.fields["train"].items()}
    text = biclip.text_inputs(example)
    members = [biclip.init(model, key, text) for key in member_keys(config, "params")]
    for variables in members:
        if trained and model.uses_text:
            variables["params"]["text_encoder"] = {"pretrained": trained.params}
        # Absent if no image embedding refines the prompt.
        if image_encoder and "pretrained_image_encoder" in variables["params"]:
            variables["params"]["pretrained_image_encoder"] = image_encoder.params
            if image_encoder.batch_stats:
                variables["batch_stats"]["pretrained_image_encoder"] = image_encoder.batch_stats
    return make(pretrained_text_encoder=trained.module) if trained else model, members


def describe_model(
    config: ConfigDict,
    encoded_text: text_encoders.EncodedText,
    image_encoder: image_encoders.PretrainedImageEncoder | None,
) -> dict[str, Any]:
    """Returns what `inference.load_model` needs to rebuild the model from a model folder."""
    fields = model_fields(config)
    for part in ("text", "image"):
        # A local path; the encoder is inside the folder.
        fields[part] = {**fields[part], "weights": ""}
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
