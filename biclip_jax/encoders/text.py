"""Encodes prompts for training and inference: token ids, or features of a frozen encoder."""

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

TEXT_ENCODER = "text_encoder"  # folder of the frozen encoder inside a model folder

# Prompts -> text fields of a `Batch`, (N, ...) each.
Encode = Callable[[Sequence[str]], dict[str, np.ndarray]]
# Prompts -> ids (N, L) and mask (N, L).
Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


class PretrainedTextEncoder(NamedTuple):
    """The text encoder of a converted folder.

    Attributes:
      folder: Converted folder.
      identity: SHA-256 over weights and tokenizer.
      module: Network.
      params: Parameters of the network, host arrays.
      tokenizer: Tokenizer of the encoder.
    """

    folder: Path
    identity: str
    module: nn.Module
    params: dict[str, Any]
    tokenizer: Tokenizer


class EncodedText(NamedTuple):
    """The encoded prompts of a run.

    Attributes:
      tokenizer: Tokenizer of the text encoder.
      fields: {split: {field of a `Batch`: array (N, ...) of all records}}.
      encoder_sha256: Identity of the pretrained encoder; "" for the scratch encoder.
    """

    tokenizer: Tokenizer
    fields: dict[str, dict[str, np.ndarray]]
    encoder_sha256: str = ""


def open_text_encoder(path: str | Path, kind: str, dtype: str = "float32") -> PretrainedTextEncoder:
    """Opens the text encoder of a folder that `biclip convert` wrote.

    Args:
      path: Converted folder.
      kind: "bert" or "clip".
      dtype: Dtype of the computation.

    Raises:
      UserError: No such folder (the message gives the command that creates one), another kind, or a
        damaged file.
    """
    folder = Path(path)
    if not path or not (folder / model_folder.CONFIG).is_file():
        raise UserError(
            f"--config.model.text.weights: no converted {kind} in {str(path)!r}; create one with "
            f"biclip convert {kind} SOURCE {path or 'FOLDER'}"
        )
    config, variables = model_folder.read(folder)
    found = config.get("kind", "biclip")
    if found != kind:
        raise UserError(
            f"{folder}: found a {found}; expected a {kind}, as in model.text.encoder; change one "
            "of them"
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
    """Opens the encoder that the fields of `model.text` name; None for the scratch encoder.

    Raises:
      UserError: See `open_text_encoder` and `check_text_encoder`; or weights for the scratch
        encoder.
    """
    if config["encoder"] == "scratch":
        if config["weights"]:
            raise UserError(
                f"--config.model.text.weights: {config['weights']!r}, but model.text.encoder is "
                "'scratch', which has no weights; set model.text.encoder to bert or clip"
            )
        return None
    encoder = open_text_encoder(config["weights"], config["encoder"], dtype)
    check_text_encoder(encoder, config)
    return encoder


def check_vocabulary(path: Path, tokenizer: Tokenizer, rows: int) -> None:
    """Raises UserError if an id exceeds the embedding table; jax would clamp it silently."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise UserError(
            f"{path}: the tokenizer's largest id is {largest}, but the weights have {rows} words; "
            "give the tokenizer of these weights"
        )


def check_text_encoder(encoder: PretrainedTextEncoder, config: Mapping[str, Any]) -> None:
    """Raises UserError if an encoder does not support the fields of `model.text`."""
    max_positions, layers = encoder.module.max_length, encoder.module.num_layers
    if config["max_length"] > max_positions:
        raise UserError(
            f"--config.model.text.max_length: {config['max_length']}; the encoder in "
            f"{encoder.folder} has {max_positions} positions; expected at most {max_positions}"
        )
    if config["pooling"] != "embedding" and layers < 2:
        raise UserError(
            f"--config.model.text.pooling: {config['pooling']!r} needs hidden state 2, but the "
            f"encoder in {encoder.folder} has {layers} layers; set embedding"
        )


def encode_splits(
    config: Mapping[str, Any],
    texts: Mapping[str, Sequence[str]],
    encoder: PretrainedTextEncoder | None,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> EncodedText:
    """Encodes the prompts of a run and their left-right swapped versions.

    Args:
      config: Fields of `model.text` in `configs/common.py`.
      texts: {split: prompts}; the scratch encoder uses the words of "train" as vocabulary.
      encoder: Pretrained encoder, or None. A frozen encoder encodes each distinct prompt once, and
        its features replace the ids.
      folder: Cache folder of the features, see `text_features.encode_prompts`.
      log: Called with a line about the number of distinct prompts.
    """
    max_length = config["max_length"]
    if encoder is None:
        return tokenize_splits(texts, max_length)
    check_text_encoder(encoder, config)
    if config["trainable"]:
        return tokenize_splits(texts, max_length, encoder.tokenizer, encoder.identity)
    distinct = _distinct_prompts(encoder.tokenizer, texts, max_length)
    log(f"{encoder.folder}: {len(distinct)} distinct prompts, including left-right swapped ones")
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
    """Tokenizes the prompts of a run and their left-right swapped versions, padded to one length.

    Args:
      texts: {split: prompts}.
      max_length: Number of tokens per prompt, including padding.
      tokenizer: Tokenizer of a pretrained encoder; None builds one from the words of "train".
      encoder_sha256: Identity of the pretrained encoder.
    """
    if tokenizer is None:
        train = texts["train"]
        # Swapped prompts too: a few prompts may name only one side, and a flip needs the other one.
        swapped = (text_lib.swap_sides(prompt) for prompt in train)
        tokenizer = text_lib.build_tokenizer([*train, *swapped])
    _distinct_prompts(tokenizer, texts, max_length)
    encode: Encode = partial(text_lib.encode_fields, tokenizer, max_length=max_length)
    fields = {split: pipeline.text_fields(encode, texts[split]) for split in texts}
    return EncodedText(tokenizer, fields, encoder_sha256)


def _distinct_prompts(tokenizer, texts, max_length):
    """Returns the distinct prompts, including swapped ones; warns about truncated prompts."""
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
    """Encodes every distinct prompt with a frozen encoder; returns {prompt: features (D,)}.

    Args:
      encoder: See `open_text_encoder`.
      config: Fields pooling and max_length of `model.text`.
      texts: Prompts.
      folder: Cache folder; None disables the cache.
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
    """Returns a function from prompts to the text fields of a batch, for inference.

    A pretrained encoder encodes each distinct prompt once during the lifetime of the function. The
    scratch encoder is part of every forward pass and gets ids.

    Args:
      model, variables, processor: See `inference.load_model`.
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
    """Returns the variables without a pretrained text encoder; see `make_encode`."""
    if not _has_pooled_encoder(model):
        return dict(variables)
    params = {name: part for name, part in variables["params"].items() if name != "text_encoder"}
    return {**variables, "params": params}


def _has_pooled_encoder(model):
    # MedCLIPSeg runs both encoders jointly and has no separate text encoder.
    return isinstance(getattr(model, "text_encoder", None), PooledTextEncoder)


def _feature_function(
    pooled: PooledTextEncoder, params: Any, tokenize: Tokenize
) -> text_features.Encode:
    # Placed in the first call: with cached features there is none.
    placed = cache(lambda: jax.device_put({"params": {"pretrained": params}}))
    apply = jax.jit(pooled.apply)

    def encode(texts: list[str]) -> np.ndarray:
        # Pad to a power of two: every size compiles anew.
        size = 1 << (len(texts) - 1).bit_length()
        filled = texts + texts[-1:] * (size - len(texts))
        return np.asarray(apply(placed(), *tokenize(filled)))[: len(texts)]

    return encode
