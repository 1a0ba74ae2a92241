"""Converts MedCLIPSeg's released checkpoints: the encoders as a CLIP, then adapters and head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from biclip_jax.core.errors import UserError
from biclip_jax.models import medclipseg
from biclip_jax.weights import architectures, convert, keys
from biclip_jax.weights.convert import Converted, Report, Tensor
from biclip_jax.weights.readers import Checkpoint

HEAD_PREFIXES = ("pvl_adapters.", "mask_head.", "upscale.")
# Files of the clip variant contain the encoders twice; the token embedding is only in the copy.
TOKEN_EMBEDDING = "clip_model.token_embedding.weight"
ALIASES = "clip_model."
PUBLISHED_LENGTH = {"bert": 256, "clip": 77}  # tokens of each prompt, including padding


def convert_medclipseg(
    checkpoint: Checkpoint, hf_config: Mapping[str, Any] | None = None
) -> Converted:
    """Converts a released MedCLIPSeg of any variant; its config has the released preprocessing.

    Args:
      checkpoint: Opened checkpoint; its arrays are read one at a time.
      hf_config: num_attention_heads of vision_config and text_config, for encoders whose heads
        are not 64 wide.

    Raises:
      UserError: Not a MedCLIPSeg, or arrays are missing, unexpected, or of the wrong shape.
    """
    path, tensors = checkpoint.path, convert.standard_names(checkpoint)
    head_tensors = {
        name: tensors.pop(name) for name in list(tensors) if name.startswith(HEAD_PREFIXES)
    }
    if not head_tensors:
        raise UserError(
            f"{path}: not a MedCLIPSeg: no array name begins with {', '.join(HEAD_PREFIXES)}; "
            "give another kind or file"
        )
    aliases = _pop_aliases(path, tensors)
    encoders = architectures.clip_of(path, _clip_names(tensors), hf_config or {})
    config = model_config(head_tensors, encoders.config)
    try:
        model = medclipseg.build(config)
    except ValueError as error:
        raise UserError(f"{path}: {error}; the file belongs to another model") from error
    ids, size = jnp.zeros((1, config["max_length"]), jnp.int32), config["image_size"]
    expected = architectures.shapes_of(model, jnp.zeros((1, size, size, 3)), ids)
    table = keys.medclipseg(config["num_layers"], config["num_upscales"])
    variables, report = convert.load(path, head_tensors, table, expected, ())
    loaded = {_our_name(name): array for name, array in encoders.variables.items()}
    all_variables = variables | loaded
    fresh = tuple(sorted(expected.keys() - all_variables.keys()))
    joined = Report(
        tuple(all_variables),
        (*report.reshaped, *map(_our_name, encoders.report.reshaped)),
        (*aliases, *encoders.report.unused),
        fresh,
    )
    return Converted(config, all_variables, joined)


def model_config(head_tensors: Mapping[str, Tensor], encoders: Mapping[str, Any]) -> dict[str, Any]:
    """`models.medclipseg.build`'s fields, read off the names and shapes; sampling as published."""
    kind = encoders["text"].get("kind", "clip")
    widths = [
        t.shape[0] for name, t in head_tensors.items() if name.endswith("proj_txt_down.weight")
    ]
    return {
        "image": encoders["image"],
        "text": encoders["text"],
        "image_size": encoders["image"].get("image_size", 0),
        "max_length": min(PUBLISHED_LENGTH[kind], encoders["text"]["max_length"]),
        "resize": "opencv",
        "input": "imagenet_bgr",
        "value_only": kind == "clip",
        "dtype": "float32",
        "adapter_width": widths[0] if widths else 0,
        "num_layers": _count(head_tensors, r"pvl_adapters\.(\d+)\."),
        "num_upscales": _count(head_tensors, r"upscale\.(\d+)\."),
        "beta": medclipseg.BETA,
        "gate_init": 0.0,
        "num_samples": 30,
    }


def _pop_aliases(path: Path, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Removes the duplicates of the clip variant's encoders and returns their names.

    Raises:
      UserError: A duplicate differs from the original.
    """
    aliases = [name for name in tensors if name.startswith(ALIASES) and name != TOKEN_EMBEDDING]
    for alias in aliases:
        suffix = alias.removeprefix(ALIASES)
        candidates = (suffix.replace("visual.", "vision_model.", 1), f"text_model.{suffix}")
        original = next((name for name in candidates if name in tensors), None)
        duplicate = tensors.pop(alias)
        if original is None or not np.array_equal(duplicate.read(), tensors[original].read()):
            raise UserError(
                f"{path}: {alias} is not the same as {original or 'any other array'}; expected two "
                "identical copies of the encoders; get the file again"
            )
    return tuple(sorted(aliases))


def _clip_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the encoders' arrays under the names of OpenAI's and open_clip's files."""
    return {
        re.sub(r"^(text_model|clip_model)\.", "", re.sub(r"^vision_model\.", "visual.", name)): t
        for name, t in tensors.items()
    }


def _our_name(name: str) -> str:
    return name.replace("/image_encoder/", f"/{medclipseg.IMAGE_PARAMS}/").replace(
        "/text_encoder/", f"/{medclipseg.TEXT_PARAMS}/"
    )


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    matches = (re.match(pattern, name) for name in tensors)
    return len({match.group(1) for match in matches if match})
