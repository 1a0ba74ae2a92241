"""Both pretrained encoders of MedCLIPSeg: the two parts of a converted CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp

from biclip_jax.core.errors import UserError
from biclip_jax.data import tokenizers
from biclip_jax.encoders import text as text_encoders
from biclip_jax.models import clip, medclipseg
from biclip_jax.weights import architectures, model_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ENCODERS_FOLDER = "encoders"  # folder of the encoders inside a model folder


class ClipPair(NamedTuple):
    """Image and text encoder of a converted CLIP, or random ones without a folder.

    Attributes:
      image, text: Fields of the encoders, see `models.clip`; random ones have no vocabulary yet.
      folder: Folder of the converted CLIP.
      identity: SHA-256 over weights and tokenizer; "" for random encoders.
      params: Parameters of the converted CLIP, host arrays; empty for random encoders.
      tokenizer: Tokenizer of the converted CLIP.
    """

    image: dict[str, Any]
    text: dict[str, Any]
    folder: Path | None = None
    identity: str = ""
    params: Mapping[str, Any] = {}
    tokenizer: Tokenizer | None = None

    @property
    def identities(self) -> dict[str, str]:
        """Returns {section of `model`: SHA-256 of its encoders}."""
        return {"encoders": self.identity}


def open_folder(path: str | Path, variant: str) -> ClipPair:
    """Opens a folder that `biclip convert clip` wrote.

    Raises:
      UserError: The folder is missing or damaged, or has another variant.
    """
    folder = Path(path)
    if not (folder / model_folder.CONFIG).is_file():
        raise UserError(
            f"--config.model.encoders.weights: no converted CLIP in {str(path)!r}; create one with "
            f"biclip convert clip SOURCE {path}"
        )
    model_config, variables = model_folder.read(folder)
    with model_folder.config_errors(folder):
        kind, fields = model_config["kind"], model_config["model"]
        parts = {name: fields[name] for name in ("image", "text")} if kind == "clip" else {}
    problem = _mismatch(parts, variant) if parts else f"found a {kind}, expected a CLIP"
    if problem:
        raise UserError(f"{folder}: {problem}; change the weights or model.variant")
    tokenizer = tokenizers.load_tokenizer(folder / "tokenizer")
    ids = jnp.zeros((1, parts["text"]["max_length"]), jnp.int32)
    size = parts["image"]["image_size"]
    with model_folder.config_errors(folder):
        expected = architectures.shapes_of(clip.build(parts), jnp.zeros((1, size, size, 3)), ids)
    model_folder.check_shapes(folder, variables, expected)
    text_encoders.check_vocabulary(folder / "tokenizer", tokenizer, parts["text"]["vocab_size"])
    identity = model_folder.identity(model_config)
    return ClipPair(
        **parts,
        folder=folder,
        identity=identity,
        params=variables["params"],
        tokenizer=tokenizer,
    )


def _mismatch(parts: Mapping[str, Mapping[str, Any]], variant: str) -> str:
    """Describes how the encoders differ from those of a variant; "" if they match."""
    defaults = {"kind": "clip", "stem_norm": True}
    for part, fields in medclipseg.ENCODERS[variant].items():
        for name in ("kind", "patch_size", "width", "num_layers", "stem_norm"):
            default = defaults.get(name)
            found, expected = parts[part].get(name, default), fields.get(name, default)
            if (name in fields or name in defaults) and found != expected:
                return (
                    f"found {name} {found} in the {part} encoder, expected {expected} for {variant}"
                )
    return ""


def load_linked(path: Path, identity: str) -> dict[str, Any]:
    """Reads the encoders inside a model folder; returns their parameters by MedCLIPSeg's names.

    Args:
      path: Model folder.
      identity: Identity of the encoders that the model was trained with.

    Raises:
      UserError: The encoders are missing, damaged or not those of the model.
    """
    model_config, variables = model_folder.read(path / ENCODERS_FOLDER)
    if model_folder.identity(model_config) != identity:
        raise UserError(
            f"{path / ENCODERS_FOLDER}: not the encoders that this model was trained with; "
            "copy the folder again"
        )
    return rename_params(variables["params"])


def rename_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the parameters of a converted CLIP to MedCLIPSeg's names."""
    names = {"image_encoder": medclipseg.IMAGE_PARAMS, "text_encoder": medclipseg.TEXT_PARAMS}
    return {names.get(name, name): part for name, part in params.items()}
