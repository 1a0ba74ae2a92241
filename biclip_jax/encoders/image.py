"""Pretrained image towers for the embedding that refines the sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from biclip_jax.core.errors import UserError
from biclip_jax.models import clip
from biclip_jax.weights import architectures, model_folder

# model.image.encoder -> what the tower's own configuration must say
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
      fields: of `models.clip.build_image_encoder`.
      module: maps pictures in [0, 1] to embeddings.
      params, batch_stats: of the module, host arrays.
    """

    identity: str
    fields: dict[str, Any]
    module: clip.ResizedImageEncoder
    params: dict[str, Any]
    batch_stats: dict[str, Any]


def open_configured(config: Mapping[str, Any], dtype: str) -> PretrainedImageEncoder | None:
    """The tower that the fields of `model.image` name; None for the CNN of our own.

    Raises:
      UserError: no such folder (with the command that makes one), another tower, a damaged
        file; weights for the CNN.
    """
    path, encoder = config["weights"], config["encoder"]
    if encoder == "cnn":
        if path:
            raise UserError(
                f"--config.model.image.weights: {path!r}, but model.image.encoder is 'cnn', which "
                "takes none; set model.image.encoder to clip_vit_b16 or clip_rn50"
            )
        return None
    folder = Path(path)
    if not path or not (folder / model_folder.CONFIG).is_file():
        raise UserError(
            f"--config.model.image.weights: no converted CLIP in {path!r}; make one: "
            f"python -m biclip_jax.convert clip SOURCE {path or 'FOLDER'}"
        )
    described, variables = model_folder.read(folder)
    with model_folder.config_errors(folder):
        fields = described["model"]["image"] if described["kind"] == "clip" else {}
        found = {name: fields.get(name) for name in EXPECTED_FIELDS[encoder]}
    if found != EXPECTED_FIELDS[encoder]:
        raise UserError(
            f"{folder}: holds {described['kind']} with {found}, model.image.encoder "
            f"{encoder!r} is {EXPECTED_FIELDS[encoder]}; give another folder or another encoder"
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
        model_folder.identity(described),
        fields,
        module,
        wrapped["params"],
        wrapped.get("batch_stats", {}),
    )


def build(fields: Mapping[str, Any], dtype: str = "float32") -> clip.ResizedImageEncoder:
    """The module of a tower's own fields."""
    return clip.ResizedImageEncoder(clip.build_image_encoder(fields, dtype))
