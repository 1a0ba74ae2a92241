"""MedCLIPSeg out of a configuration: its towers, sentences, variables and loss."""

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
    """The towers of `model.variant`: converted, or random ones of the configured sizes.

    Raises:
      UserError: no such folder (with the command that makes one), other towers than the
        variant's, a damaged file.
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
            "towers have a vocabulary of the captions' words, which needs a BERT: set unimedclip "
            "or biomedclip, or give the weights"
        )
    both = {name: sizes[name] for name in ("width", "num_layers", "num_heads")}
    both |= {"mlp_width": 4 * sizes.width}
    variant = medclipseg.ENCODERS[model.variant]
    image = {**variant["image"], **both, "image_size": model.image_size}
    image |= {"patch_size": sizes.patch_size, "embedding_size": sizes.embedding_size}
    text = {**variant["text"], **both, "projection_size": sizes.embedding_size}
    return ClipPair(image, {**text, "max_length": model.max_length})


def link_encoders(encoders: ClipPair, folder: Path) -> None:
    """Puts converted towers inside a model folder."""
    if encoders.folder:
        model_folder.link_folder(encoders.folder, folder / ENCODERS_FOLDER)


def encode_texts(
    config: ConfigDict,
    texts: Mapping[str, Sequence[str]],
    encoders: ClipPair,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> text_encoders.EncodedText:
    """The ids of a run's sentences and of their mirror images, padded to one length.

    Args:
      config: resolved.
      texts: {split: sentences}; with random towers the words are those of "train".
      towers: for the tokenizer.
      folder, log: not needed: nothing is computed ahead where both towers work together.
    """
    return text_encoders.tokenize_splits(
        texts, text_length(config, encoders), encoders.tokenizer, encoders.identity
    )


def text_length(config: ConfigDict, encoders: ClipPair) -> int:
    """Tokens of every sentence, padding included: `model.max_length`, at most the tower's.

    Raises:
      UserError: the tower has fewer positions.
    """
    wanted, longest = config.model.max_length, encoders.text.get("max_length", 512)
    if wanted > longest:
        raise UserError(
            f"--config.model.max_length: {wanted}; the text tower has {longest} positions; "
            "set at most that"
        )
    return wanted


def make_spec(
    config: ConfigDict, encoded_text: text_encoders.EncodedText, encoders: ClipPair, labelled: float
) -> ModelSpec:
    """The model, its first variables and its loss.

    Raises:
      ValueError: fields or sizes that do not go together.
    """
    if labelled < 1:
        raise ValueError("data.unlabelled is for BiCLIP; MedCLIPSeg has no loss without masks")
    if config.ensemble > 1:
        raise ValueError("ensemble is for BiCLIP; MedCLIPSeg's samples are its ensemble")
    if config.optim.encoder_learning_rate > 0:
        raise ValueError("optim.encoder_learning_rate: MedCLIPSeg's towers are not trained; set 0")
    if config.optim.accumulate > 1 and config.loss.contrastive > 0:
        raise ValueError(
            "loss.contrastive compares the pictures of a step, and optim.accumulate takes them in "
            "parts; set one of them to 1 or 0"
        )
    fields = model_fields(config, encoded_text, encoders)
    model = medclipseg.build(fields)
    key = member_keys(config, "params")[0]
    given = rename_params(encoders.params)
    variables = medclipseg.init(model, key, config.model.max_length, without=tuple(given))
    variables["params"] |= given
    recipe = objective.make_recipe(config.to_dict())
    axis_name = distributed.axis_name_of(config.parallel.mode)
    loss = partial(objective.objective, model=model, recipe=recipe, axis_name=axis_name)
    return ModelSpec(
        model=model,
        members=[variables],
        objective=loss,
        frozen=medclipseg.FROZEN,
        linked=medclipseg.FROZEN if encoders.params else (),
        described={
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
    """What `models.medclipseg.build` is given, and how pictures and sentences are prepared."""
    text = dict(encoders.text)
    if not encoders.params:
        text["vocab_size"] = encoded_text.tokenizer.get_vocab_size()
    if text.get("kind") == "bert":
        text["dropout"] = config.model.encoders.dropout
    names = ("adapter_width", "beta", "gate_init", "num_layers", "num_upscales", "num_samples")
    image_size = encoders.image["image_size"]
    if config.model.image_size != image_size:
        raise ValueError(f"model.image_size is {config.model.image_size}; the towers' {image_size}")
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
