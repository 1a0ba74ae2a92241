"""Builds MedCLIPSeg from a config: encoders, encoded prompts, variables and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from biclip_jax.core import distributed
from biclip_jax.core.errors import UserError
from biclip_jax.core.rng import member_keys
from biclip_jax.encoders import text as text_encoders
from biclip_jax.encoders.clip_pair import ENCODERS_FOLDER, ClipPair, open_folder, rename_params
from biclip_jax.experiment.model_spec import ModelSpec
from biclip_jax.models import medclipseg
from biclip_jax.training.objectives import medclipseg as objective
from biclip_jax.weights import model_folder


def open_encoders(config: ConfigDict) -> ClipPair:
    """Opens the encoders of `model.variant`, or describes random ones of the configured sizes.

    Raises:
      UserError: No such folder (the message gives the command that creates one), encoders of
        another variant, or a damaged file.
    """
    model = config.model
    if not model.encoders.weights:
        return _random_encoders(config)
    return open_folder(model.encoders.weights, model.variant)


def _random_encoders(config: ConfigDict) -> ClipPair:
    model, sizes = config.model, config.model.encoders
    if medclipseg.ENCODERS[model.variant]["text"].get("kind") != "bert":
        raise UserError(
            f"--config.model.variant: {model.variant!r} without model.encoders.weights; random "
            "encoders use the vocabulary of the captions, which requires a BERT: set unimedclip "
            "or biomedclip, or set the weights"
        )
    common = {name: sizes[name] for name in ("width", "num_layers", "num_heads")}
    common |= {"mlp_width": 4 * sizes.width}
    variant = medclipseg.ENCODERS[model.variant]
    image = {**variant["image"], **common, "image_size": model.image_size}
    image |= {"patch_size": sizes.patch_size, "embedding_size": sizes.embedding_size}
    text = {**variant["text"], **common, "projection_size": sizes.embedding_size}
    return ClipPair(image, {**text, "max_length": model.max_length})


def link_encoders(encoders: ClipPair, folder: Path) -> None:
    """Links converted encoders into a model folder."""
    if encoders.folder:
        model_folder.link_folder(encoders.folder, folder / ENCODERS_FOLDER)


def encode_texts(
    config: ConfigDict,
    texts: Mapping[str, Sequence[str]],
    encoders: ClipPair,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> text_encoders.EncodedText:
    """Tokenizes the prompts of a run and their left-right swapped versions, padded to one length.

    Args:
      config: Resolved config.
      texts: {split: prompts}; random encoders use the words of "train" as vocabulary.
      encoders: Provide the tokenizer.
      folder, log: Unused: both encoders run jointly, so no features are computed in advance.
    """
    return text_encoders.tokenize_splits(
        texts, text_length(config, encoders), encoders.tokenizer, encoders.identity
    )


def text_length(config: ConfigDict, encoders: ClipPair) -> int:
    """Returns the number of tokens of every prompt, including padding: `model.max_length`.

    Raises:
      UserError: The text encoder has fewer positions.
    """
    max_length, limit = config.model.max_length, encoders.text.get("max_length", 512)
    if max_length > limit:
        raise UserError(
            f"--config.model.max_length: {max_length}; the text encoder has {limit} positions; "
            f"expected at most {limit}"
        )
    return max_length


def make_spec(
    config: ConfigDict,
    encoded_text: text_encoders.EncodedText,
    encoders: ClipPair,
    labelled_batch_fraction: float,
) -> ModelSpec:
    """Builds the model, its initial variables and its loss; see `biclip_spec.make_spec`.

    Raises:
      ValueError: Incompatible config fields or sizes.
    """
    if labelled_batch_fraction < 1:
        raise ValueError("data.unlabelled: MedCLIPSeg has no loss without masks; leave it empty")
    if config.ensemble > 1:
        raise ValueError("ensemble: MedCLIPSeg samples instead of an ensemble; set it to 1")
    if config.optim.encoder_learning_rate > 0:
        raise ValueError(
            "optim.encoder_learning_rate: MedCLIPSeg freezes its encoders; set it to 0"
        )
    if config.optim.accumulate > 1 and config.loss.contrastive > 0:
        raise ValueError(
            "loss.contrastive compares all images of a step, but optim.accumulate splits them; "
            "set optim.accumulate to 1 or loss.contrastive to 0"
        )
    fields = model_fields(config, encoded_text, encoders)
    model = medclipseg.build(fields)
    key = member_keys(config, "params")[0]
    pretrained = rename_params(encoders.params)
    variables = medclipseg.init(model, key, config.model.max_length, exclude=tuple(pretrained))
    variables["params"] |= pretrained
    recipe = objective.make_recipe(config.to_dict())
    axis_name = distributed.axis_name_of(config.parallel.mode)
    loss = partial(objective.objective, model=model, recipe=recipe, axis_name=axis_name)
    return ModelSpec(
        model=model,
        members=[variables],
        objective=loss,
        frozen=medclipseg.FROZEN,
        linked=medclipseg.FROZEN if encoders.params else (),
        model_config={
            "kind": "medclipseg",
            "model": fields,
            "vocab_size": encoded_text.tokenizer.get_vocab_size(),
            "encoders_sha256": encoders.identity,
            "name": config.name,
            "data": config.data.name,
        },
    )


def model_fields(
    config: ConfigDict, encoded_text: text_encoders.EncodedText, encoders: ClipPair
) -> dict[str, Any]:
    """Returns the fields of `models.medclipseg.build` and of the preprocessing."""
    text = dict(encoders.text)
    if not encoders.params:
        text["vocab_size"] = encoded_text.tokenizer.get_vocab_size()
    if text.get("kind") == "bert":
        text["dropout"] = config.model.encoders.dropout
    names = ("adapter_width", "beta", "gate_init", "num_layers", "num_upscales", "num_samples")
    image_size = encoders.image["image_size"]
    if config.model.image_size != image_size:
        raise ValueError(
            f"model.image_size is {config.model.image_size}; expected {image_size}, the size of "
            "the image encoder"
        )
    return {
        "image": dict(encoders.image),
        "text": text,
        "image_size": image_size,
        "max_length": config.model.max_length,
        "resize": config.data.resize,
        "input": config.model.input,
        "value_only": config.model.variant in medclipseg.VALUE_ONLY,
        "dtype": config.model.dtype,
        **{name: config.model[name] for name in names},
    }
