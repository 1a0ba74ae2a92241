"""Model folders: config.json, model.safetensors, tokenizer/, README.md, metrics.json."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from biclip_jax.errors import UserError

FORMAT = "biclip_jax.model/1"
CONFIG, WEIGHTS, CARD, METRICS = "config.json", "model.safetensors", "README.md", "metrics.json"


def write(
    folder: Path,
    *,
    config: Mapping[str, Any],
    variables: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> None:
    """Writes a model folder; the weights first, then the config that names their SHA-256.

    Args:
      folder: made if missing; the tokenizer is the caller's to write.
      config: {"model": ..., "vocab_size": ..., "name": ..., "data": ..., "step": ...}.
      variables: as `model.apply` takes them, host arrays.
      scores: {split: {name: value}}, for metrics.json and the model card.
    """
    from safetensors.numpy import save

    folder.mkdir(parents=True, exist_ok=True)
    flat = {name: np.asarray(value) for name, value in flatten_dict(variables, sep="/").items()}
    data = save(flat)
    _replace(folder / WEIGHTS, data)
    _replace(folder / CARD, model_card(config, scores).encode())
    _replace(folder / METRICS, _json(scores))
    described = {**config, "format": FORMAT, "sha256": hashlib.sha256(data).hexdigest()}
    _replace(folder / CONFIG, _json(described))


def model_card(config: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """What the model is, what it reached, and what it is not for; Markdown."""
    reached = "\n".join(
        f"- {split} {name}: {value:.4f}"
        for split, values in scores.items()
        for name, value in values.items()
        if isinstance(value, float)
    )
    size = config["model"]["image_size"]
    return f"""# {config["name"]}

BiCLIP (arXiv 2603.00156), {size} x {size} pixels, trained on `{config["data"]}` for
{config["step"]} steps with biclip_jax. One binary mask for a picture and a sentence.

{reached}

    predictor = biclip_jax.load("this folder")
    mask, probability, uncertainty = predictor.predict("picture.png", "a sentence")

For research. Not a medical device: no clinical validation, and no claim
outside the pictures and the wording it was trained on.
"""


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the variables (nested dicts of numpy arrays) of a model folder.

    Raises:
      UserError: a file is missing, damaged, or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        data = (folder / WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no model folder ({error}); expected {CONFIG} and {WEIGHTS}; "
            "give the workdir of a run or a folder written by one"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG}: not of the format {FORMAT}; write the folder anew")
    if hashlib.sha256(data).hexdigest() != config.get("sha256"):
        raise UserError(
            f"{folder / WEIGHTS}: its SHA-256 is not the one in {CONFIG}; the file was damaged or "
            "exchanged; copy the folder again"
        )
    try:
        flat = load(data)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS}: no safetensors file ({error})") from error
    return config, unflatten_dict(flat, sep="/")


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
