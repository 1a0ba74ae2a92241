"""Pretrained image towers for the embedding that refines the sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from biclip_jax.errors import UserError
from biclip_jax.models import clip
from biclip_jax.weights import architectures
from biclip_jax.weights import folder as model_folder

# model.image.encoder -> what the tower's own configuration must say
KINDS: dict[str, dict[str, Any]] = {
    "clip_vit_b16": {
        name: clip.VIT_B16[name] for name in ("kind", "patch_size", "width", "num_layers")
    },
    "clip_rn50": {"kind": "resnet", "width": 64, "stages": [3, 4, 6, 3]},
}


class OpenedTower(NamedTuple):
    """The image part of a converted CLIP folder.

    Attributes:
      identity: SHA-256 over its files.
      fields: of `models.clip.build_image_encoder`.
      module: maps pictures in [0, 1] to embeddings.
      params, batch_stats: of the module, host arrays.
    """

    identity: str
    fields: dict[str, Any]
    module: clip.ImageTower
    params: dict[str, Any]
    batch_stats: dict[str, Any]


def open_configured(config: Mapping[str, Any], dtype: str) -> OpenedTower | None:
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
    with model_folder.describing(folder):
        fields = described["model"]["image"] if described["kind"] == "clip" else {}
        found = {name: fields.get(name) for name in KINDS[encoder]}
    if found != KINDS[encoder]:
        raise UserError(
            f"{folder}: holds {described['kind']} with {found}, model.image.encoder "
            f"{encoder!r} is {KINDS[encoder]}; give another folder or another encoder"
        )
    with model_folder.describing(folder):
        parts = {
            name: part["image_encoder"]
            for name, part in variables.items()
            if "image_encoder" in part
        }
        module = build(fields, dtype)
        size = fields["image_size"]
        expected = architectures.shapes_of(module.tower, jnp.zeros((1, size, size, 3)))
    model_folder.check_shapes(folder, parts, expected)
    wrapped = {name: {"tower": part} for name, part in parts.items()}
    return OpenedTower(
        model_folder.identity(described),
        fields,
        module,
        wrapped["params"],
        wrapped.get("batch_stats", {}),
    )


def build(fields: Mapping[str, Any], dtype: str = "float32") -> clip.ImageTower:
    """The module of a tower's own fields."""
    return clip.ImageTower(clip.build_image_encoder(fields, dtype))
