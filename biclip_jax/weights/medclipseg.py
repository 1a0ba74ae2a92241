"""MedCLIPSeg's released checkpoints: the towers as a CLIP, then adapters and head."""

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

OWN = ("pvl_adapters.", "mask_head.", "upscale.")
# The clip variant's file holds its towers twice; the words lie among the second names alone.
WORDS = "clip_model.token_embedding.weight"
ALIASES = "clip_model."
PUBLISHED_LENGTH = {"bert": 256, "clip": 77}  # tokens of every sentence, padding included


def convert_medclipseg(
    checkpoint: Checkpoint, hf_config: Mapping[str, Any] | None = None
) -> Converted:
    """A released MedCLIPSeg, any variant; with the released preprocessing.

    Args:
      checkpoint: opened; its arrays are read one by one.
      hf_config: num_attention_heads of vision_config and text_config, for towers whose heads
        are not 64 wide.

    Raises:
      UserError: no MedCLIPSeg, or arrays missing, too many, or misshapen.
    """
    path, tensors = checkpoint.path, convert.standard_names(checkpoint)
    own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(OWN)}
    if not own:
        raise UserError(
            f"{path}: no MedCLIPSeg: none of its arrays begins with {', '.join(OWN)}; "
            "give another kind or file"
        )
    aliases = _take_aliases(path, tensors)
    encoders = architectures.clip_of(path, _as_clip(tensors), hf_config or {})
    config = model_config(own, encoders.config)
    try:
        model = medclipseg.build(config)
    except ValueError as error:
        raise UserError(f"{path}: {error}; the file belongs to another model") from error
    ids, size = jnp.zeros((1, config["max_length"]), jnp.int32), config["image_size"]
    expected = architectures.shapes_of(model, jnp.zeros((1, size, size, 3)), ids)
    table = keys.medclipseg(config["num_layers"], config["num_upscales"])
    variables, report = convert.load(path, own, table, expected, ())
    loaded = {_our_name(name): array for name, array in encoders.variables.items()}
    everything = variables | loaded
    fresh = tuple(sorted(expected.keys() - everything.keys()))
    joined = Report(
        tuple(everything),
        (*report.reshaped, *map(_our_name, encoders.report.reshaped)),
        (*aliases, *encoders.report.unused),
        fresh,
    )
    return Converted(config, everything, joined)


def model_config(own: Mapping[str, Tensor], encoders: Mapping[str, Any]) -> dict[str, Any]:
    """`models.medclipseg.build`'s fields, read off the names and shapes; sampling as published."""
    kind = encoders["text"].get("kind", "clip")
    widths = [t.shape[0] for name, t in own.items() if name.endswith("proj_txt_down.weight")]
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
        "num_layers": _count(own, r"pvl_adapters\.(\d+)\."),
        "num_upscales": _count(own, r"upscale\.(\d+)\."),
        "beta": medclipseg.BETA,
        "gate_init": 0.0,
        "num_samples": 30,
    }


def _take_aliases(path: Path, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Removes the second names of the clip variant's towers; returns them.

    Raises:
      UserError: one holds other numbers than the first.
    """
    aliases = [name for name in tensors if name.startswith(ALIASES) and name != WORDS]
    for alias in aliases:
        bare = alias.removeprefix(ALIASES)
        names = (bare.replace("visual.", "vision_model.", 1), f"text_model.{bare}")
        first = next((name for name in names if name in tensors), None)
        second = tensors.pop(alias)
        if first is None or not np.array_equal(second.read(), tensors[first].read()):
            raise UserError(
                f"{path}: {alias} is not the same as {first or 'any other array'}; expected the "
                "towers twice with the same numbers; get the file again"
            )
    return tuple(sorted(aliases))


def _as_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The towers under the names of OpenAI's and open_clip's files."""
    return {
        re.sub(r"^(text_model|clip_model)\.", "", re.sub(r"^vision_model\.", "visual.", name)): t
        for name, t in tensors.items()
    }


def _our_name(name: str) -> str:
    return name.replace("/image_encoder/", f"/{medclipseg.IMAGE_PARAMS}/").replace(
        "/text_encoder/", f"/{medclipseg.TEXT_PARAMS}/"
    )


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in tensors)
    return len({match.group(1) for match in found if match})
