"""Detects the architecture of a checkpoint from its array shapes, and converts it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from biclip_jax.core.errors import UserError
from biclip_jax.models import bert, biclip, clip, fusion
from biclip_jax.models.transformer import ACTIVATIONS
from biclip_jax.weights import convert, keys
from biclip_jax.weights.convert import Converted, Tensor
from biclip_jax.weights.readers import Checkpoint

# Widths with a head size of 64 in all released encoders: BERT base and large, OpenAI's CLIP.
HEAD_SIZE, KNOWN_WIDTHS = 64, (512, 640, 768, 1024)
# Token embeddings in OpenAI's text encoder and in open_clip's BERT.
OPENAI_TOKEN_EMBEDDING = "token_embedding.weight"
BERT_TOKEN_EMBEDDING = "transformer.embeddings.word_embeddings.weight"


def convert_clip(checkpoint: Checkpoint, hf_config: Mapping[str, Any] | None = None) -> Converted:
    """Converts a CLIP of Hugging Face, OpenAI or open_clip, ViT or ModifiedResNet.

    Args:
      checkpoint: Opened checkpoint; its arrays are read one at a time.
      hf_config: Hugging Face's config.json, if there is one: it has the number of heads, the
        activation and the epsilon, which the arrays do not.

    Raises:
      UserError: Not a CLIP, or arrays are missing, unexpected, or of the wrong shape.
    """
    path, tensors = checkpoint.path, convert.standard_names(checkpoint)
    for prefix in ("text.", "text_encoder."):  # open_clip's CustomTextCLIP, and UniMedCLIP
        if any(
            f"{prefix}{name}" in tensors for name in (OPENAI_TOKEN_EMBEDDING, BERT_TOKEN_EMBEDDING)
        ):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return clip_of(path, tensors, hf_config or {})


def clip_of(path: Path, tensors: dict[str, Tensor], hf_config: Mapping[str, Any]) -> Converted:
    """Converts a CLIP from {name: tensor}, see `convert_clip`."""
    dialect = _clip_dialect(path, tensors)
    build_config = _hf_clip if dialect == "hf" else _openai_clip
    config = build_config(_Shapes(path, tensors), hf_config)
    sizes = [
        config["image"]["embedding_size"],
        config["text"].get("embedding_size") or config["text"]["projection_size"],
    ]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{path}: the image projection has {sizes[0]} outputs, text_projection {sizes[1]}; "
            "expected the same number; the file is not of a single model"
        )
    table = keys.clip(config["image"], config["text"], dialect)
    size = config["image"]["image_size"]
    model, ids = clip.build(config), jnp.zeros((1, config["text"]["max_length"]), jnp.int32)
    expected = shapes_of(model, jnp.zeros((1, size, size, 3)), ids)
    variables, report = convert.load(path, tensors, table, expected, keys.CLIP_UNUSED)
    return Converted(config, variables, report)


def convert_bert(checkpoint: Checkpoint, hf_config: Mapping[str, Any] | None = None) -> Converted:
    """Converts a Hugging Face BERT: plain, with a language head, or CXR-BERT with its projection.

    Args:
      checkpoint: See `convert_clip`.
      hf_config: See `convert_clip`.

    Raises:
      UserError: See `convert_clip`.
    """
    path, tensors = checkpoint.path, convert.standard_names(checkpoint)
    _require_names(
        path, tensors, r"(bert\.)?(encoder\.layer|embeddings)\.", "BERT", "encoder.layer.*"
    )
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    config = _bert_config(_Shapes(path, tensors), prefix, hf_config or {})
    table = keys.bert(config, prefix)
    ids = jnp.zeros((1, 1), jnp.int32)
    expected = shapes_of(bert.build(config), ids, ids.astype(bool))
    variables, report = convert.load(path, tensors, table, expected, keys.BERT_UNUSED)
    return Converted(config, variables, report)


def convert_biclip(
    checkpoint: Checkpoint, hf_config: Mapping[str, Any] | None = None, max_length: int = 32
) -> tuple[Converted, Converted]:
    """Converts the published BiCLIP's Lightning checkpoint: network and frozen CXR-BERT.

    Args:
      checkpoint: Opened checkpoint; its arrays are read one at a time.
      hf_config: Config of the CXR-BERT, see `convert_bert`.
      max_length: Length of its prompts in tokens; 32 as published.

    Raises:
      UserError: See `convert_clip`.
    """
    path = checkpoint.path
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in convert.standard_names(checkpoint).items()
    }
    _require_names(
        path, tensors, r"(inc|text_refiner)\.", "published BiCLIP", "inc.*, text_refiner.*"
    )
    encoder_prefix = "text_encoder.model."
    encoder_tensors = {
        name.removeprefix(encoder_prefix): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(encoder_prefix)
    }
    if not encoder_tensors:
        raise UserError(f"{path}: {encoder_prefix}* is missing; give the whole checkpoint")
    encoder = convert_bert(Checkpoint(path, checkpoint.format, encoder_tensors), hf_config)
    config = _biclip_config(_Shapes(path, tensors), max_length)
    features = jnp.zeros((1, encoder.config["width"]))
    size = config["image_size"]
    try:
        model = biclip.build(config)
    except ValueError as error:
        raise UserError(f"{path}: {error}; the file belongs to another model") from error
    expected = shapes_of(model, jnp.zeros((1, size, size, 3)), text_features=features)
    num_doublings = len(fusion.generator_widths(size)) + 1
    table = keys.biclip(config["num_levels"], num_doublings)
    variables, report = convert.load(path, tensors, table, expected, keys.BICLIP_UNUSED)
    return Converted(config, variables, report), encoder


def shapes_of(model: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Returns {"params/...": shape} of a model without computing anything."""
    variables = jax.eval_shape(partial(model.init, **kwargs), jax.random.key(0), *inputs)
    return {name: leaf.shape for name, leaf in flatten_dict(variables, sep="/").items()}


class _Shapes:
    """Shapes by name; raises a UserError that names a missing array."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        self.path, self.names, self._tensors = path, list(tensors), tensors

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise UserError(f"{self.path}: {name} is missing; give the whole checkpoint")
        if len(tensor.shape) != rank or 0 in tensor.shape:
            raise UserError(
                f"{self.path}: {name} has shape {tensor.shape}; expected {rank} axes, none empty; "
                "the file belongs to another model"
            )
        return tensor.shape

    def side(self, name: str) -> int:
        """Returns the side of the square grid of a table of 1 + side^2 positions."""
        return _side(self.path, name, self.of(name, 2)[0])

    def count(self, pattern: str) -> int:
        """Returns how many values the pattern's group takes, such as the number of layers."""
        matches = (re.match(pattern, name) for name in self.names)
        return len({match.group(1) for match in matches if match})


def _side(path: Path, name: str, rows: int) -> int:
    side = math.isqrt(rows - 1)
    if side < 1 or side**2 != rows - 1:
        raise UserError(
            f"{path}: {name} has {rows} rows; expected 1 plus a square number; "
            "the file belongs to another model"
        )
    return side


def _clip_dialect(path: Path, tensors: Mapping[str, Tensor]) -> str:
    if any(name.startswith("vision_model.") for name in tensors):
        return "hf"
    if any(name.startswith("visual.") for name in tensors):
        return "openai"
    expected = "vision_model.* (Hugging Face) or visual.* (OpenAI, open_clip)"
    raise _wrong_kind(path, tensors, "CLIP", expected)


def _require_names(
    path: Path, tensors: Mapping[str, Tensor], pattern: str, kind: str, expected: str
) -> None:
    if not any(re.match(pattern, name) for name in tensors):
        raise _wrong_kind(path, tensors, kind, expected)


def _wrong_kind(path: Path, tensors: Mapping[str, Tensor], kind: str, expected: str) -> UserError:
    some = ", ".join(sorted(tensors)[:3])
    return UserError(
        f"{path}: no {kind}: its arrays are {some} ...; expected {expected}; "
        "give another kind or file"
    )


def _hf_clip(shapes: _Shapes, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    image_config, text_config = _encoder_configs(shapes.path, hf_config)
    image, text = "vision_model.", "text_model."
    width, _, patch, _ = shapes.of(f"{image}embeddings.patch_embedding.weight", 4)
    side = shapes.side(f"{image}embeddings.position_embedding.weight")
    vocab_size, text_width = shapes.of(f"{text}embeddings.token_embedding.weight", 2)
    return {
        "image": {
            "kind": "vit",
            "image_size": side * patch,
            "patch_size": patch,
            "width": width,
            "num_layers": shapes.count(rf"{image}encoder\.layers\.(\d+)\."),
            "num_heads": _heads(shapes.path, image_config, width),
            "mlp_width": shapes.of(f"{image}encoder.layers.0.mlp.fc1.weight", 2)[0],
            "embedding_size": shapes.of("visual_projection.weight", 2)[0],
            "activation": _activation(shapes.path, image_config, "quick_gelu"),
            "epsilon": _epsilon(shapes.path, image_config, 1e-5),
        },
        "text": {
            "vocab_size": vocab_size,
            "max_length": shapes.of(f"{text}embeddings.position_embedding.weight", 2)[0],
            "width": text_width,
            "num_layers": shapes.count(rf"{text}encoder\.layers\.(\d+)\."),
            "num_heads": _heads(shapes.path, text_config, text_width),
            "mlp_width": shapes.of(f"{text}encoder.layers.0.mlp.fc1.weight", 2)[0],
            "embedding_size": shapes.of("text_projection.weight", 2)[0],
            "activation": _activation(shapes.path, text_config, "quick_gelu"),
            "epsilon": _epsilon(shapes.path, text_config, 1e-5),
        },
    }


def _openai_clip(shapes: _Shapes, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    image_config, text_config = _encoder_configs(shapes.path, hf_config)
    describe_text = _open_clip_bert if BERT_TOKEN_EMBEDDING in shapes.names else _openai_text
    if "visual.attnpool.positional_embedding" in shapes.names:
        image = _openai_resnet(shapes)
    elif "visual.trunk.pos_embed" in shapes.names:
        image = _timm_vit(shapes, image_config)
    else:
        image = _openai_vit(shapes, image_config)
    return {"image": image, "text": describe_text(shapes, text_config)}


def _openai_text(shapes: _Shapes, text_config: Mapping[str, Any]) -> dict[str, Any]:
    vocab_size, width = shapes.of(OPENAI_TOKEN_EMBEDDING, 2)
    return {
        "vocab_size": vocab_size,
        "max_length": shapes.of("positional_embedding", 2)[0],
        "width": width,
        "num_layers": shapes.count(r"transformer\.resblocks\.(\d+)\."),
        "num_heads": _heads(shapes.path, text_config, width),
        "mlp_width": shapes.of("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "embedding_size": shapes.of("text_projection", 2)[1],
        "activation": _activation(shapes.path, text_config, "quick_gelu"),
        "epsilon": _epsilon(shapes.path, text_config, 1e-5),
    }


def _open_clip_bert(shapes: _Shapes, text_config: Mapping[str, Any]) -> dict[str, Any]:
    # Activation and epsilon are BERT's; open_clip's config describes only the image encoder's.
    heads = {name: text_config[name] for name in ("num_attention_heads",) if name in text_config}
    return {
        "kind": "bert",
        **_bert_config(shapes, "transformer.", heads),
        "projection_size": shapes.of("proj.2.weight", 2)[0],
        "projection_kind": "mlp",
    }


def _timm_vit(shapes: _Shapes, image_config: Mapping[str, Any]) -> dict[str, Any]:
    width, _, patch, _ = shapes.of("visual.trunk.patch_embed.proj.weight", 4)
    num_positions = shapes.of("visual.trunk.pos_embed", 3)[1]
    return {
        "kind": "vit",
        "image_size": _side(shapes.path, "visual.trunk.pos_embed", num_positions) * patch,
        "patch_size": patch,
        "width": width,
        "num_layers": shapes.count(r"visual\.trunk\.blocks\.(\d+)\."),
        "num_heads": _heads(shapes.path, image_config, width),
        "mlp_width": shapes.of("visual.trunk.blocks.0.mlp.fc1.weight", 2)[0],
        "embedding_size": shapes.of("visual.head.proj.weight", 2)[0],
        "activation": "gelu",
        "epsilon": 1e-6,
        "patch_bias": True,
        "stem_norm": False,
    }


def _openai_vit(shapes: _Shapes, image_config: Mapping[str, Any]) -> dict[str, Any]:
    width, _, patch, _ = shapes.of("visual.conv1.weight", 4)
    side = shapes.side("visual.positional_embedding")
    return {
        "kind": "vit",
        "image_size": side * patch,
        "patch_size": patch,
        "width": width,
        "num_layers": shapes.count(r"visual\.transformer\.resblocks\.(\d+)\."),
        "num_heads": _heads(shapes.path, image_config, width),
        "mlp_width": shapes.of("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "embedding_size": shapes.of("visual.proj", 2)[1],
        "activation": _activation(shapes.path, image_config, "quick_gelu"),
        "epsilon": _epsilon(shapes.path, image_config, 1e-5),
    }


def _openai_resnet(shapes: _Shapes) -> dict[str, Any]:
    width = shapes.of("visual.layer1.0.conv1.weight", 4)[0]
    side = shapes.side("visual.attnpool.positional_embedding")
    return {
        "kind": "resnet",
        "image_size": side * 32,
        "width": width,
        "stages": [shapes.count(rf"visual\.layer{i}\.(\d+)\.") for i in range(1, 5)],
        "num_heads": max(32 * width // HEAD_SIZE, 1),
        "embedding_size": shapes.of("visual.attnpool.c_proj.weight", 2)[0],
    }


def _bert_config(shapes: _Shapes, prefix: str, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    vocab_size, width = shapes.of(f"{prefix}embeddings.word_embeddings.weight", 2)
    positions = hf_config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise UserError(
            f"{shapes.path}: config.json says position_embedding_type {positions}; expected "
            "absolute; convert a BERT with learned positions"
        )
    head = "cls_projection_head.dense_to_output.weight"
    return {
        "vocab_size": vocab_size,
        "max_length": shapes.of(f"{prefix}embeddings.position_embeddings.weight", 2)[0],
        "num_segments": shapes.of(f"{prefix}embeddings.token_type_embeddings.weight", 2)[0],
        "width": width,
        "num_layers": shapes.count(rf"{re.escape(prefix)}encoder\.layer\.(\d+)\."),
        "num_heads": _heads(shapes.path, hf_config, width),
        "mlp_width": shapes.of(f"{prefix}encoder.layer.0.intermediate.dense.weight", 2)[0],
        "projection_size": shapes.of(head, 2)[0] if head in shapes.names else 0,
        "activation": _activation(shapes.path, hf_config, "gelu"),
        "epsilon": _epsilon(shapes.path, hf_config, 1e-12),
    }


def _biclip_config(shapes: _Shapes, max_length: int) -> dict[str, Any]:
    width = shapes.of("inc.double_conv.0.weight", 4)[0]
    shapes.of("generator.0.weight", 4)
    num_doublings = shapes.count(r"generator\.(\d+)\.")
    return {
        "image_size": fusion.SEED_SIZE * 2**num_doublings,
        "width": width,
        "num_levels": shapes.count(r"down(\d+)\.") + 1,
        "dtype": "float32",
        "text": {
            "encoder": "bert",
            "trainable": False,
            "pooling": "all_tokens",
            "max_length": max_length,
        },
    }


def _encoder_configs(
    path: Path, hf_config: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    configs = [hf_config.get(name) or {} for name in ("vision_config", "text_config")]
    if not all(isinstance(config, Mapping) for config in configs):
        raise UserError(
            f"{path}: the vision_config or text_config of config.json is not an object; "
            "get the file again"
        )
    return configs[0], configs[1]


def _heads(path: Path, config: Mapping[str, Any], width: int) -> int:
    heads = config.get("num_attention_heads")
    if heads is None and width in KNOWN_WIDTHS:
        return width // HEAD_SIZE
    if type(heads) is not int or heads < 1 or width % heads:
        raise UserError(
            f"{path}: num_attention_heads is {str(heads)[:40]} for a width of {width}; expected a "
            "divisor; put the model's config.json (or open_clip_config.json) next to the weights"
        )
    return heads


def _epsilon(path: Path, config: Mapping[str, Any], default: float) -> float:
    epsilon = config.get("layer_norm_eps", default)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise UserError(
            f"{path}: config.json has layer_norm_eps {str(epsilon)[:40]}; expected a small "
            "positive number; get the file again"
        )
    return epsilon


def _activation(path: Path, config: Mapping[str, Any], default: str) -> str:
    name = config.get("hidden_act", default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UserError(
            f"{path}: config.json has hidden_act {str(name)[:40]!r}; expected "
            f"{', '.join(ACTIVATIONS)}; this activation is not implemented"
        )
    return name
