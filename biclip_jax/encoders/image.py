"""Pretrained image encoders, whose embedding refines the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from biclip_jax.core.errors import UserError
from biclip_jax.models import clip
from biclip_jax.weights import architectures, model_folder

# model.image.encoder -> fields that the encoder's config must have
EXPECTED_FIELDS: dict[str, dict[str, Any]] = {
    "clip_vit_b16": {
        name: clip.VIT_B16[name] for name in ("kind", "patch_size", "width", "num_layers")
    },
    "clip_rn50": {"kind": "resnet", "width": 64, "stages": [3, 4, 6, 3]},
}


class PretrainedImageEncoder(NamedTuple):
    """The image part of a converted CLIP folder.

    Attributes:
      identity: SHA-256 over its files.
      fields: Fields of `models.clip.build_image_encoder`.
      module: Maps images in [0, 1] to embeddings.
      params, batch_stats: Variables of the module, host arrays.
    """

    identity: str
    fields: dict[str, Any]
    module: clip.ResizedImageEncoder
    params: dict[str, Any]
    batch_stats: dict[str, Any]


def open_configured(config: Mapping[str, Any], dtype: str) -> PretrainedImageEncoder | None:
    """Opens the encoder that the fields of `model.image` name; None for the CNN.

    Raises:
      UserError: No such folder (the message gives the command that creates one), another encoder, a
        damaged file, or weights for the CNN.
    """
    path, encoder = config["weights"], config["encoder"]
    if encoder == "cnn":
        if path:
            raise UserError(
                f"--config.model.image.weights: {path!r}, but model.image.encoder is 'cnn', which "
                "has no weights; set model.image.encoder to clip_vit_b16 or clip_rn50"
            )
        return None
    folder = Path(path)
    if not path or not (folder / model_folder.CONFIG).is_file():
        raise UserError(
            f"--config.model.image.weights: no converted CLIP in {path!r}; create one with "
            f"biclip convert clip SOURCE {path or 'FOLDER'}"
        )
    model_config, variables = model_folder.read(folder)
    with model_folder.config_errors(folder):
        fields = model_config["model"]["image"] if model_config["kind"] == "clip" else {}
        found = {name: fields.get(name) for name in EXPECTED_FIELDS[encoder]}
    if found != EXPECTED_FIELDS[encoder]:
        raise UserError(
            f"{folder}: found {model_config['kind']} with {found}; expected "
            f"{EXPECTED_FIELDS[encoder]} for model.image.encoder={encoder!r}; change one of them"
        )
    with model_folder.config_errors(folder):
        parts = {
            name: part["image_encoder"]
            for name, part in variables.items()
            if "image_encoder" in part
        }
        module = build(fields, dtype)
        size = fields["image_size"]
        expected = architectures.shapes_of(module.pretrained, jnp.zeros((1, size, size, 3)))
    model_folder.check_shapes(folder, parts, expected)
    wrapped = {name: {"pretrained": part} for name, part in parts.items()}
    return PretrainedImageEncoder(
        model_folder.identity(model_config),
        fields,
        module,
        wrapped["params"],
        wrapped.get("batch_stats", {}),
    )


def build(fields: Mapping[str, Any], dtype: str = "float32") -> clip.ResizedImageEncoder:
    """Builds the module from the fields of the encoder."""
    return clip.ResizedImageEncoder(clip.build_image_encoder(fields, dtype))
