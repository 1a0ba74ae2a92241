"""Cached text features: a frozen text encoder encodes each distinct prompt once."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from biclip_jax.core.errors import UserError
from biclip_jax.weights import model_folder, readers

# Part of the file name. Increment it whenever the same encoder would give other features.
FORMAT = 1
BATCH_SIZE = 32  # prompts

# Prompts -> features (N, D) float32; N is at most BATCH_SIZE.
Encode = Callable[[list[str]], np.ndarray]


def encode_prompts(
    prompts: Iterable[str],
    encode: Encode,
    *,
    identity: Any = None,
    folder: Path | None = None,
) -> dict[str, np.ndarray]:
    """Encodes every distinct prompt once.

    Args:
      prompts: Prompts, possibly repeated.
      encode: Text encoder; called with batches of up to BATCH_SIZE prompts.
      identity: JSON value of everything the features depend on: hashes of weights and tokenizer,
        pooling, maximum length.
      folder: Cache folder; the file name contains a hash of `identity` and the prompts. None
        disables the cache.

    Returns:
      {prompt: features (D,) float32}.
    """
    distinct = sorted(set(prompts))
    if not distinct:
        return {}
    path = None if folder is None else folder / _name(identity, distinct)
    features = None if path is None else _stored(path, len(distinct))
    if features is None:
        parts = [
            encode(distinct[start : start + BATCH_SIZE])
            for start in range(0, len(distinct), BATCH_SIZE)
        ]
        features = np.concatenate(parts).astype(np.float32)
        if path is not None:
            digest = hashlib.sha256(features.tobytes()).hexdigest()
            _store(path, features, digest)
    return dict(zip(distinct, features, strict=True))


def _name(identity: Any, prompts: list[str]) -> str:
    identifiers = json.dumps([FORMAT, identity, prompts], sort_keys=True)
    return f"text_features-{hashlib.sha256(identifiers.encode()).hexdigest()[:16]}.safetensors"


def _store(path: Path, features: np.ndarray, digest: str) -> None:
    try:
        model_folder.write_tensors(path, {"features": features}, {"sha256": digest})
    except (OSError, UserError) as error:  # the next run encodes again
        warnings.warn(f"text features are not cached ({error})", stacklevel=3)


def _stored(path: Path, num_prompts: int) -> np.ndarray | None:
    """Reads cached features; None if there are none or the file is damaged."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    try:
        features = readers.open_checkpoint(path).tensors["features"].read()
        with safe_open(path, "np") as file:
            digest = file.metadata()["sha256"]
    except (UserError, KeyError, TypeError):
        return None
    intact = hashlib.sha256(features.tobytes()).hexdigest() == digest
    return features if intact and len(features) == num_prompts else None
