"""The pretrained towers of MedCLIPSeg: both parts of a converted CLIP."""

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

ENCODERS_FOLDER = "encoders"  # their own folder, inside a model folder


class ClipPair(NamedTuple):
    """Both towers: a converted CLIP, or random ones without a folder.

    Attributes:
      image, text: their own fields, see `models.clip`; a random text tower has no vocabulary yet.
      folder: of the converted CLIP.
      identity: SHA-256 over its weights and tokenizer; empty for random ones.
      params: of the converted CLIP, host arrays; empty for random ones.
      tokenizer: of the converted CLIP.
    """

    image: dict[str, Any]
    text: dict[str, Any]
    folder: Path | None = None
    identity: str = ""
    params: Mapping[str, Any] = {}
    tokenizer: Tokenizer | None = None

    @property
    def identities(self) -> dict[str, str]:
        """{section of `model`: SHA-256 of its towers}."""
        return {"encoders": self.identity}


def open_folder(path: str | Path, variant: str) -> ClipPair:
    """A folder that `python -m biclip_jax.convert clip` wrote; errors as `open_towers`."""
    folder = Path(path)
    if not (folder / model_folder.CONFIG).is_file():
        raise UserError(
            f"--config.model.encoders.weights: no converted CLIP in {str(path)!r}; make one: "
            f"python -m biclip_jax.convert clip SOURCE {path}"
        )
    described, variables = model_folder.read(folder)
    with model_folder.config_errors(folder):
        kind, fields = described["kind"], described["model"]
        parts = {name: fields[name] for name in ("image", "text")} if kind == "clip" else {}
    problem = _mismatch(parts, variant) if parts else f"holds a {kind}, not a CLIP"
    if problem:
        raise UserError(f"{folder}: {problem}; give other weights or another model.variant")
    tokenizer = tokenizers.load_tokenizer(folder / "tokenizer")
    ids = jnp.zeros((1, parts["text"]["max_length"]), jnp.int32)
    size = parts["image"]["image_size"]
    with model_folder.config_errors(folder):
        expected = architectures.shapes_of(clip.build(parts), jnp.zeros((1, size, size, 3)), ids)
    model_folder.check_shapes(folder, variables, expected)
    text_encoders.check_vocabulary(folder / "tokenizer", tokenizer, parts["text"]["vocab_size"])
    identity = model_folder.identity(described)
    return ClipPair(
        **parts,
        folder=folder,
        identity=identity,
        params=variables["params"],
        tokenizer=tokenizer,
    )


def _mismatch(parts: Mapping[str, Mapping[str, Any]], variant: str) -> str:
    """What is not as in the towers of a variant, in words; empty where all is."""
    defaults = {"kind": "clip", "stem_norm": True}  # what towers are that do not say so
    for part, wanted in medclipseg.ENCODERS[variant].items():
        for name in ("kind", "patch_size", "width", "num_layers", "stem_norm"):
            default = defaults.get(name)
            found, expected = parts[part].get(name, default), wanted.get(name, default)
            if (name in wanted or name in defaults) and found != expected:
                return f"the {part} tower has {name} {found}, that of {variant} has {expected}"
    return ""


def load_linked(path: Path, identity: str) -> dict[str, Any]:
    """The parameters of the towers that lie inside a model folder, under MedCLIPSeg's names.

    Args:
      path: of the model folder.
      identity: of the towers that the model was trained with.

    Raises:
      UserError: they are missing, damaged, or others.
    """
    described, variables = model_folder.read(path / ENCODERS_FOLDER)
    if model_folder.identity(described) != identity:
        raise UserError(
            f"{path / ENCODERS_FOLDER}: not the towers that this model was trained with; "
            "copy the folder again"
        )
    return rename_params(variables["params"])


def rename_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """A converted CLIP's parameters under MedCLIPSeg's names."""
    names = {"image_encoder": medclipseg.IMAGE_PARAMS, "text_encoder": medclipseg.TEXT_PARAMS}
    return {names.get(name, name): part for name, part in params.items()}
