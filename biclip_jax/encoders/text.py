"""Sentences for training and inference: token ids, or the vectors of a frozen text tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from biclip_jax.core.errors import UserError
from biclip_jax.data import pipeline, tokenizers
from biclip_jax.data import text as text_lib
from biclip_jax.encoders import text_features
from biclip_jax.models import bert, clip
from biclip_jax.models.text import PooledTextEncoder
from biclip_jax.weights import architectures, model_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXT_ENCODER = "text_encoder"  # the frozen tower's own folder, inside a model folder

# sentences -> the sentence fields of a batch, (N, ...) each
Encode = Callable[[Sequence[str]], dict[str, np.ndarray]]
# sentences -> ids (N, L) and mask (N, L)
Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


class PretrainedTextEncoder(NamedTuple):
    """The text part of a converted folder.

    Attributes:
      folder: where it lies.
      identity: SHA-256 over its weights and tokenizer.
      module: the tower.
      params: of the tower, host arrays.
      tokenizer: of the tower.
    """

    folder: Path
    identity: str
    module: nn.Module
    params: dict[str, Any]
    tokenizer: Tokenizer


class EncodedText(NamedTuple):
    """The sentences of a run.

    Attributes:
      tokenizer: of the text encoder.
      fields: {split: {field of a `Batch`: (N, ...) of the whole split}}.
      encoder_sha256: identity of the pretrained encoder; empty for none.
    """

    tokenizer: Tokenizer
    fields: dict[str, dict[str, np.ndarray]]
    encoder_sha256: str = ""


def open_text_encoder(path: str | Path, kind: str, dtype: str = "float32") -> PretrainedTextEncoder:
    """The text tower of a folder that `python -m biclip_jax.convert` wrote.

    Args:
      path: of the folder.
      kind: "bert" or "clip".
      dtype: of the computation.

    Raises:
      UserError: no such folder (with the command that makes one), another kind, a damaged file.
    """
    folder = Path(path)
    if not path or not (folder / model_folder.CONFIG).is_file():
        raise UserError(
            f"--config.model.text.weights: no converted {kind} tower in {str(path)!r}; make one: "
            f"python -m biclip_jax.convert {kind} SOURCE {path or 'FOLDER'}"
        )
    config, variables = model_folder.read(folder)
    found = config.get("kind", "biclip")
    if found != kind:
        raise UserError(
            f"{folder}: holds a {found}, model.text.encoder is {kind!r}; "
            "give another folder or another encoder"
        )
    tokenizer = tokenizers.load_tokenizer(folder / "tokenizer")
    with model_folder.config_errors(folder):
        params, fields = variables["params"], config["model"]
        if kind == "clip":
            params, fields = params["text_encoder"], fields["text"]
        build = {"bert": bert.build, "clip": clip.build_text_encoder}[kind]
        module: nn.Module = build(fields, dtype)
        ids = jnp.zeros((1, 1), jnp.int32)
        expected = architectures.shapes_of(module, ids, ids > 0)
    model_folder.check_shapes(folder, {"params": params}, expected)
    check_vocabulary(folder / "tokenizer", tokenizer, fields["vocab_size"])
    return PretrainedTextEncoder(folder, model_folder.identity(config), module, params, tokenizer)


def open_configured(config: Mapping[str, Any], dtype: str) -> PretrainedTextEncoder | None:
    """The tower that the fields of `model.text` name; None for the scratch encoder.

    Raises:
      UserError: as `open_text_encoder` and `check_text_encoder`; weights for the scratch encoder.
    """
    if config["encoder"] == "scratch":
        if config["weights"]:
            raise UserError(
                f"--config.model.text.weights: {config['weights']!r}, but model.text.encoder is "
                "'scratch', which takes none; set model.text.encoder to bert or clip"
            )
        return None
    encoder = open_text_encoder(config["weights"], config["encoder"], dtype)
    check_text_encoder(encoder, config)
    return encoder


def check_vocabulary(path: Path, tokenizer: Tokenizer, rows: int) -> None:
    """Raises UserError where an id lies past the tower's embedding, which jax would not say."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise UserError(
            f"{path}: the tokenizer's largest id is {largest}, the weights have {rows} words; "
            "give the tokenizer of these weights"
        )


def check_text_encoder(encoder: PretrainedTextEncoder, config: Mapping[str, Any]) -> None:
    """Raises UserError where a tower cannot do what the fields of `model.text` ask."""
    longest, layers = encoder.module.max_length, encoder.module.num_layers
    if config["max_length"] > longest:
        raise UserError(
            f"--config.model.text.max_length: {config['max_length']}; the tower in {encoder.folder} "
            f"has {longest} positions; set at most that"
        )
    if config["pooling"] != "embedding" and layers < 2:
        raise UserError(
            f"--config.model.text.pooling: {config['pooling']!r} needs hidden state 2; the tower "
            f"in {encoder.folder} has {layers} layers; set embedding"
        )


def encode_splits(
    config: Mapping[str, Any],
    texts: Mapping[str, Sequence[str]],
    encoder: PretrainedTextEncoder | None,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> EncodedText:
    """The sentences of a run and their mirror images, as its model takes them.

    Args:
      config: the fields of `model.text` in `configs/common.py`.
      texts: {split: sentences}; without a tower, the words are those of "train".
      tower: pretrained; where it is not to be trained it sees each distinct
        sentence once, and its vectors take the place of the ids.
      folder: where those vectors are kept, see `weights.text_features`.
      log: takes a line on what the tower is given.
    """
    max_length = config["max_length"]
    if encoder is None:
        return tokenize_splits(texts, max_length)
    check_text_encoder(encoder, config)
    if config["trainable"]:
        return tokenize_splits(texts, max_length, encoder.tokenizer, encoder.identity)
    distinct = _distinct_prompts(encoder.tokenizer, texts, max_length)
    log(f"{encoder.folder}: {len(distinct)} distinct sentences, mirrored ones included")
    features = frozen_text_features(encoder, config, distinct, folder)
    encode: Encode = partial(text_lib.feature_fields, features)
    fields = {split: pipeline.text_fields(encode, texts[split]) for split in texts}
    return EncodedText(encoder.tokenizer, fields, encoder.identity)


def tokenize_splits(
    texts: Mapping[str, Sequence[str]],
    max_length: int,
    tokenizer: Tokenizer | None = None,
    encoder_sha256: str = "",
) -> EncodedText:
    """Token ids of a run's sentences and of their mirror images, padded to one length.

    Args:
      texts: {split: sentences}.
      max_length: tokens of each, padding included.
      tokenizer: of a tower; None: a word for each word of "train".
      tower: its identity.
    """
    if tokenizer is None:
        train = texts["train"]
        # Mirrored ones, too: few sentences may name one side alone, and a flip names the other.
        swapped = (text_lib.swap_sides(prompt) for prompt in train)
        tokenizer = text_lib.build_tokenizer([*train, *swapped])
    _distinct_prompts(tokenizer, texts, max_length)
    encode: Encode = partial(text_lib.encode_fields, tokenizer, max_length=max_length)
    fields = {split: pipeline.text_fields(encode, texts[split]) for split in texts}
    return EncodedText(tokenizer, fields, encoder_sha256)


def _distinct_prompts(tokenizer, texts, max_length):
    """The distinct sentences, mirrored ones included; warns of those that are cut."""
    distinct = {prompt for split in texts.values() for prompt in split}
    distinct |= {text_lib.swap_sides(prompt) for prompt in distinct}
    text_lib.warn_truncated(tokenizer, sorted(distinct), max_length)
    return sorted(distinct)


def frozen_text_features(
    encoder: PretrainedTextEncoder,
    config: Mapping[str, Any],
    texts: Sequence[str],
    folder: Path | None = None,
) -> dict[str, np.ndarray]:
    """The frozen tower's vector of every distinct sentence, {sentence: (D,)}.

    Args:
      tower: see `open_text_encoder`.
      config: the fields pooling and max_length of `model.text`.
      texts: any number.
      folder: where vectors are kept from run to run; None: nowhere.
    """
    identity = {
        "encoder": encoder.identity,
        "module": str(encoder.module),
        "pooling": config["pooling"],
        "max_length": config["max_length"],
    }
    tokenize = partial(text_lib.encode, encoder.tokenizer, max_length=config["max_length"])
    apply = _feature_function(
        PooledTextEncoder(encoder.module, config["pooling"]), encoder.params, tokenize
    )
    return text_features.encode_prompts(texts, apply, identity=identity, folder=folder)


def make_encode(model: nn.Module, variables: Mapping[str, Any], processor: Any) -> Encode:
    """Sentences to what the model takes of them, for inference.

    A pretrained tower sees each distinct sentence once, as long as the encoder
    lives; the scratch encoder is part of every pass and gets ids.

    Args:
      model, variables, processor: what `inference.load_model` gives.
    """
    if not _has_pooled_encoder(model):
        return processor.encode
    tokenize = partial(text_lib.encode, processor.tokenizer, max_length=processor.max_length)
    params = variables["params"]["text_encoder"]["pretrained"]
    apply = _feature_function(model.text_encoder, params, tokenize)
    known: dict[str, np.ndarray] = {}

    def encode(texts: Sequence[str]) -> dict[str, np.ndarray]:
        new = set(texts) - known.keys()
        text_lib.warn_truncated(processor.tokenizer, sorted(new), processor.max_length)
        known.update(text_features.encode_prompts(new, apply))
        return text_lib.feature_fields(known, texts)

    return encode


def without_text_encoder(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that a pass over `make_encode`'s vectors needs."""
    if not _has_pooled_encoder(model):
        return dict(variables)
    params = {name: part for name, part in variables["params"].items() if name != "text_encoder"}
    return {**variables, "params": params}


def _has_pooled_encoder(model):
    # Models whose towers work together have no encoder of sentences alone.
    return isinstance(getattr(model, "text_encoder", None), PooledTextEncoder)


def _feature_function(
    pooled: PooledTextEncoder, params: Any, tokenize: Tokenize
) -> text_features.Encode:
    # Placed at the first call: where every vector is known there is none.
    placed = cache(lambda: jax.device_put({"params": {"pretrained": params}}))
    apply = jax.jit(pooled.apply)

    def encode(texts: list[str]) -> np.ndarray:
        # Every size would compile again: powers of two are few.
        size = 1 << (len(texts) - 1).bit_length()
        filled = texts + texts[-1:] * (size - len(texts))
        return np.asarray(apply(placed(), *tokenize(filled)))[: len(texts)]

    return encode
