"""Frozen text towers over distinct sentences: each is encoded once, and kept on disk."""

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

# Part of every name: raise it whenever the same tower would give other features.
FORMAT = 1
BATCH_SIZE = 32  # sentences at a time

# Sentences to their vectors (N, D), float32; N is at most BATCH_SIZE.
Encode = Callable[[list[str]], np.ndarray]


def encode_prompts(
    prompts: Iterable[str],
    encode: Encode,
    *,
    identity: Any = None,
    folder: Path | None = None,
) -> dict[str, np.ndarray]:
    """The vector of every distinct sentence, {sentence: (D,) float32}; {} for none.

    Args:
      sentences: each distinct one is encoded once, whatever its number.
      encode: the tower; sees batches of BATCH_SIZE, the last one smaller.
      identity: JSON of what the vectors depend on: hashes of weights and
        tokenizer, pooling, length.
      folder: where the vectors are kept, under a name that holds a hash of
        `identity` and the sentences; None: nowhere.
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
    described = json.dumps([FORMAT, identity, prompts], sort_keys=True)
    return f"text_features-{hashlib.sha256(described.encode()).hexdigest()[:16]}.safetensors"


def _store(path: Path, features: np.ndarray, digest: str) -> None:
    try:
        model_folder.write_tensors(path, {"features": features}, {"sha256": digest})
    except (OSError, UserError) as error:  # the next run encodes again
        warnings.warn(f"the sentences' vectors are not kept ({error})", stacklevel=3)


def _stored(path: Path, num_prompts: int) -> np.ndarray | None:
    """What an earlier run left; None where there is nothing, or it is damaged."""
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
