"""MedCLIPSeg out of a configuration: its towers, sentences, variables and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from biclip_jax import parallel, sentences
from biclip_jax.assembly import Assembly, member_keys
from biclip_jax.errors import UserError
from biclip_jax.medclipseg_towers import TOWERS, Towers, open_folder, place
from biclip_jax.models import medclipseg
from biclip_jax.training import objective_medclipseg as objective
from biclip_jax.weights import folder as model_folder


def open_towers(config: ConfigDict) -> Towers:
    """The towers of `model.variant`: converted, or random ones of the configured sizes.

    Raises:
      UserError: no such folder (with the command that makes one), other towers than the
        variant's, a damaged file.
    """
    model = config.model
    if not model.towers.weights:
        return _random_towers(config)
    return open_folder(model.towers.weights, model.variant)


def _random_towers(config: ConfigDict) -> Towers:
    model, sizes = config.model, config.model.towers
    if medclipseg.TOWERS[model.variant]["text"].get("kind") != "bert":
        raise UserError(
            f"--config.model.variant: {model.variant!r} without model.towers.weights; random "
            "towers have a vocabulary of the captions' words, which needs a BERT: set unimedclip "
            "or biomedclip, or give the weights"
        )
    both = {name: sizes[name] for name in ("width", "num_layers", "num_heads")}
    both |= {"mlp_width": 4 * sizes.width}
    variant = medclipseg.TOWERS[model.variant]
    image = {**variant["image"], **both, "image_size": model.image_size}
    image |= {"patch_size": sizes.patch_size, "embedding_size": sizes.embedding_size}
    text = {**variant["text"], **both, "projection_size": sizes.embedding_size}
    return Towers(image, {**text, "max_length": model.max_length})


def link_towers(towers: Towers, folder: Path) -> None:
    """Puts converted towers inside a model folder."""
    if towers.folder:
        model_folder.link(towers.folder, folder / TOWERS)


def read_sentences(
    config: ConfigDict,
    texts: Mapping[str, Sequence[str]],
    towers: Towers,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> sentences.Sentences:
    """The ids of a run's sentences and of their mirror images, padded to one length.

    Args:
      config: resolved.
      texts: {split: sentences}; with random towers the words are those of "train".
      towers: for the tokenizer.
      folder, log: not needed: nothing is computed ahead where both towers work together.
    """
    return sentences.as_ids(texts, text_length(config, towers), towers.tokenizer, towers.identity)


def text_length(config: ConfigDict, towers: Towers) -> int:
    """Tokens of every sentence, padding included: `model.max_length`, at most the tower's.

    Raises:
      UserError: the tower has fewer positions.
    """
    wanted, longest = config.model.max_length, towers.text.get("max_length", 512)
    if wanted > longest:
        raise UserError(
            f"--config.model.max_length: {wanted}; the text tower has {longest} positions; "
            "set at most that"
        )
    return wanted


def assemble(
    config: ConfigDict, spoken: sentences.Sentences, towers: Towers, labelled: float
) -> Assembly:
    """The model, its first variables and its loss.

    Raises:
      ValueError: fields or sizes that do not go together.
    """
    if labelled < 1:
        raise ValueError("data.unlabelled is for BiCLIP; MedCLIPSeg has no loss without masks")
    if config.ensemble > 1:
        raise ValueError("ensemble is for BiCLIP; MedCLIPSeg's samples are its ensemble")
    if config.optim.tower_learning_rate > 0:
        raise ValueError("optim.tower_learning_rate: MedCLIPSeg's towers are not trained; set 0")
    if config.optim.accumulate > 1 and config.loss.contrastive > 0:
        raise ValueError(
            "loss.contrastive compares the pictures of a step, and optim.accumulate takes them in "
            "parts; set one of them to 1 or 0"
        )
    fields = model_fields(config, spoken, towers)
    model = medclipseg.build(fields)
    key = member_keys(config, "params")[0]
    given = place(towers.params)
    variables = medclipseg.init(model, key, config.model.max_length, without=tuple(given))
    variables["params"] |= given
    recipe = objective.make_recipe(config.to_dict())
    axis_name = parallel.axis_of(config.parallel.mode)
    loss = partial(objective.objective, model=model, recipe=recipe, axis_name=axis_name)
    return Assembly(
        model=model,
        members=[variables],
        objective=loss,
        frozen=medclipseg.FROZEN,
        linked=medclipseg.FROZEN if towers.params else (),
        described={
            "kind": "medclipseg",
            "model": fields,
            "vocab_size": spoken.tokenizer.get_vocab_size(),
            "towers": towers.identity,
            "name": config.name,
            "data": config.data.name,
        },
    )


def model_fields(config: ConfigDict, spoken: sentences.Sentences, towers: Towers) -> dict[str, Any]:
    """What `models.medclipseg.build` is given, and how pictures and sentences are prepared."""
    text = dict(towers.text)
    if not towers.params:
        text["vocab_size"] = spoken.tokenizer.get_vocab_size()
    if text.get("kind") == "bert":
        text["dropout"] = config.model.towers.dropout
    names = ("adapter_width", "beta", "gate_init", "num_layers", "num_upscales", "num_samples")
    image_size = towers.image["image_size"]
    if config.model.image_size != image_size:
        raise ValueError(f"model.image_size is {config.model.image_size}; the towers' {image_size}")
    return {
        "image": dict(towers.image),
        "text": text,
        "image_size": image_size,
        "max_length": config.model.max_length,
        "resize": config.data.resize,
        "input": config.model.input,
        "value_only": config.model.variant in medclipseg.VALUE_ONLY,
        "dtype": config.model.dtype,
        **{name: config.model[name] for name in names},
    }
