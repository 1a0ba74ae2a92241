"""The BiCLIP model (arXiv 2603.00156): fuse, then segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from biclip_jax.models import fusion
from biclip_jax.models.layers import full_precision
from biclip_jax.models.text import PooledTextEncoder, TextEncoder
from biclip_jax.models.unet import UNet, block_names

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PSEUDO_MEAN, PSEUDO_STD = 0.5, 0.25
HEADS = ("cycle", "iac")

# Values of fields that an older config does not have: the model `published`.
DEFAULTS: dict[str, Any] = {
    "norm": "batch",
    "remat": False,
    "pseudo_image": True,
    "pseudo_contrast": False,
    "bmf": {
        "vision_to_text": True,
        "text_to_vision": True,
        "levels": "",
        "hidden": 256,
        "zero_init": False,
    },
    "image": {"encoder": "cnn"},
    "heads": HEADS,
    "iac_blocks": ("decoder_0",),
}


class Fused(NamedTuple):
    """Outputs of the fusion. Outputs that the model's fields disable are None.

    Attributes:
      text: (B, 784) projected text t.
      refined_text: (B, 784) refined text t' = t + g([t; i]).
      pseudo_image: (B, H, W, 3) in [0, 1], generated from the refined text.
      cycle_text: (B, 784) text reconstructed from the pseudo-image; None outside training.
    """

    text: Float[Array, "b t"] | None
    refined_text: Float[Array, "b t"] | None
    pseudo_image: Float[Array, "b h w 3"] | None
    cycle_text: Float[Array, "b t"] | None


class View(NamedTuple):
    """Inputs of the U-Net.

    Attributes:
      image, pseudo_image: (B, H, W, 3) in [0, 1]; pseudo_image is None if the model has no
        generator.
      text: (B, 784) text embedding for the text-conditioned levels; None without them.
    """

    image: Float[Array, "b h w 3"]
    pseudo_image: Float[Array, "b h w 3"] | None
    text: Float[Array, "b t"] | None = None


class Segmented(NamedTuple):
    """Logits (B, H, W, 1), and {block: embedding (B, 256)} of the consistency heads."""

    logits: Float[Array, "b h w 1"]
    embeddings: dict[str, Array]


class BiCLIP(nn.Module):
    """BiCLIP; its fields select `published`, `full` and the baselines.

    Images are float32 in [0, 1], (B, H, W, 3), H = W = image_size; the model normalises them
    itself. The text input is either `text_ids` and `text_mask` (B, L), or `text_features` (B, D),
    the pooled output of a frozen text encoder. Without a pseudo-image and without text-conditioned
    levels the model is the image-only U-Net and ignores the text.

    Attributes:
      image_size: Image side, 28 * 2^k and divisible by 2 to the number of poolings.
      widths: Channels of the U-Net's levels.
      norm: Norm of the U-Net's blocks, "batch" or "group".
      remat: Whether to rematerialise the U-Net's blocks, see `unet.UNet`.
      encoder_widths, cycle_widths: Channels of the image encoder and of the cycle head.
      pseudo_image: Whether a pseudo-image generated from the text is the U-Net's second input.
      pseudo_contrast: Initialisation of the generator, see `fusion.Generator`.
      vision_to_text: Whether the image refines the text, at the input and at the levels.
      text_to_vision: Whether the text modulates the levels.
      levels: U-Net blocks with fusion, see `unet.block_names`.
      level_hidden: Hidden features of the refiners at the levels.
      zero_init: Whether all refiners are zero at initialisation, so that the refined text is the
        projected text.
      no_text: Whether an empty prompt is replaced by a learned vector.
      heads: Training-only heads: "cycle", "iac", both or none.
      iac_blocks: Decoder blocks with a consistency head.
      text_encoder: Module that maps (ids, mask) to (B, D); None if the inputs are text_features.
      pretrained_image_encoder: Module that maps images to (B, Di); None: `fusion.ImageEncoder`.
      axis_name: Device axis of BatchNorm's statistics in training.
      dtype: Dtype of the computation; parameters, statistics and logits are float32.
    """

    image_size: int = 224
    widths: Sequence[int] = (64, 128, 256, 512, 1024)
    norm: str = "batch"
    remat: bool = False
    encoder_widths: Sequence[int] = (64, 256)
    cycle_widths: Sequence[int] = (32, 64)
    pseudo_image: bool = True
    pseudo_contrast: bool = False
    vision_to_text: bool = True
    text_to_vision: bool = True
    levels: Sequence[str] = ()
    level_hidden: int = 256
    zero_init: bool = False
    no_text: bool = False
    heads: Sequence[str] = HEADS
    iac_blocks: Sequence[str] = ("decoder_0",)
    text_encoder: nn.Module | None = None
    pretrained_image_encoder: nn.Module | None = None
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @property
    def uses_text(self) -> bool:
        """Whether the prediction depends on the text."""
        return self.pseudo_image or (self.text_to_vision and bool(self.levels))

    def setup(self):
        self.unet = UNet(
            self.widths,
            norm=self.norm,
            remat=self.remat,
            # Without text to vision, refining the text at the levels has no effect on the mask.
            fused_blocks=self.levels if self.text_to_vision else (),
            vision_to_text=self.vision_to_text,
            text_to_vision=self.text_to_vision,
            fusion_hidden=self.level_hidden,
            zero_init=self.zero_init,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        if "iac" in self.heads:
            self.consistency_heads = {
                block: fusion.ConsistencyHead(name=_consistency_name(block))
                for block in self.iac_blocks
            }
        if not self.uses_text:
            return
        self.text_projection = fusion.TextMLP(dtype=self.dtype)
        if self.no_text:
            table = nn.initializers.normal(0.02)
            self.no_text_embedding = self.param("no_text_embedding", table, (fusion.TEXT_DIM,))
        if self.vision_to_text:
            encoder = fusion.ImageEncoder(self.encoder_widths, dtype=self.dtype)
            self.image_encoder = self.pretrained_image_encoder or encoder
            self.refiner = fusion.TextRefiner(zero_init=self.zero_init, dtype=self.dtype)
        if self.pseudo_image:
            self.generator = fusion.Generator(
                self.image_size, self.pseudo_contrast, dtype=self.dtype
            )
        if self.pseudo_image and "cycle" in self.heads:
            self.cycle_head = fusion.CycleHead(widths=self.cycle_widths, dtype=self.dtype)

    def __call__(
        self,
        image: Float[Array, "b h w 3"],
        text_ids: Int[Array, "b l"] | None = None,
        text_mask: Bool[Array, "b l"] | None = None,
        text_features: Float[Array, "b d"] | None = None,
        has_text: Bool[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b h w 1"], dict[str, Array]]:
        """Runs inference; returns logits and the named intermediates.

        The intermediates are features (B, H, W, widths[0]) of the last decoder block and, where
        the model has them, text, refined_text and pseudo_image (see `Fused`). `has_text` is false
        for empty prompts, see `no_text`.
        """
        fused = self.fuse(image, text_ids, text_mask, text_features, has_text)
        view = View(image, fused.pseudo_image, fused.refined_text)
        logits, features = self.segment(view)
        if self.is_initializing():
            self._touch_training_heads(fused, features)
        intermediates = {"features": features["decoder_0"], **fused._asdict()}
        return logits, {name: value for name, value in intermediates.items() if value is not None}

    def fuse(
        self,
        image: Float[Array, "b h w 3"],
        text_ids: Int[Array, "b l"] | None = None,
        text_mask: Bool[Array, "b l"] | None = None,
        text_features: Float[Array, "b d"] | None = None,
        has_text: Bool[Array, " b"] | None = None,
        train: bool = False,
    ) -> Fused:
        """Refines the text with the image and generates the pseudo-image from the refined text."""
        if not self.uses_text:
            return Fused(None, None, None, None)
        if text_features is None:
            if self.text_encoder is None:
                raise ValueError("the model has no text encoder; pass text_features")
            text_features = self.text_encoder(text_ids, text_mask)
        text = refined_text = full_precision(self.text_projection(text_features))
        if self.no_text and has_text is not None:
            text = refined_text = jnp.where(has_text[:, None], text, self.no_text_embedding)
        if self.vision_to_text:
            refined_text = self.refiner(text, self.image_encoder(image))
        if not self.pseudo_image:
            return Fused(text, refined_text, None, None)
        pseudo_image = self.generator(refined_text)
        reconstruct = train and "cycle" in self.heads
        cycle_text = self.cycle_head(pseudo_image) if reconstruct else None
        return Fused(text, refined_text, pseudo_image, cycle_text)

    def segment(
        self, view: View, train: bool = False
    ) -> tuple[Float[Array, "b h w 1"], dict[str, Array]]:
        """Computes logits and {name: features} of the decoder blocks for one view."""
        x = (view.image - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
        if view.pseudo_image is not None:
            x = jnp.concatenate([x, (view.pseudo_image - PSEUDO_MEAN) / PSEUDO_STD], axis=-1)
        return self.unet(x, train, view.text)

    def training_pass(self, view: View) -> Segmented:
        """Runs `segment` with batch statistics, and the consistency heads."""
        return self._with_embeddings(*self.segment(view, train=True))

    def _with_embeddings(self, logits, features):
        heads = self.consistency_heads if "iac" in self.heads else {}
        return Segmented(logits, {block: head(features[block]) for block, head in heads.items()})

    def _touch_training_heads(self, fused, features):
        """Creates the parameters that only training uses, so that one init creates all of them."""
        self._with_embeddings(None, features)
        if fused.pseudo_image is not None and "cycle" in self.heads:
            self.cycle_head(fused.pseudo_image)


def _consistency_name(block: str) -> str:
    """Returns the parameter name of a head; the published network has only that of decoder_0."""
    return "consistency_head" if block == "decoder_0" else f"consistency_head_{block}"


def to_unit_rgb(image: Array) -> Float[Array, "b h w 3"]:
    """Converts uint8 (B, H, W, 1 or 3) to float32 (B, H, W, 3) in [0, 1]."""
    image = image.astype(jnp.float32) / 255
    return jnp.broadcast_to(image, (*image.shape[:3], 3))


def text_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the model's text inputs: ids and mask, or the features of a frozen text encoder."""
    names = ("text_features",) if "text_features" in batch else ("text_ids", "text_mask")
    return {name: batch[name] for name in (*names, "has_text") if name in batch}


def init(model: BiCLIP, key: Key[Array, ""], text: Mapping[str, Array]) -> dict[str, Any]:
    """Initialises the variables (params, batch_stats), training heads included; float32.

    Args:
      model: Has a text encoder if `text` holds ids.
      key: Key of the parameters.
      text: Text inputs of one example, see `text_inputs`.
    """
    size = model.image_size
    variables = jax.jit(model.init)(key, jnp.zeros((1, size, size, 3)), **text)
    return {"batch_stats": {}, **variables}


def build(
    config: Mapping[str, Any],
    *,
    vocab_size: int = 0,
    pretrained_text_encoder: nn.Module | None = None,
    pretrained_image_encoder: nn.Module | None = None,
    axis_name: str | None = None,
) -> BiCLIP:
    """Builds the model that a resolved `model` config describes.

    Args:
      config: Fields of `model` in `configs/common.py`; missing ones default to `published`, see
        `DEFAULTS`.
      vocab_size: Vocabulary size of the tokenizer, for the scratch text encoder.
      pretrained_text_encoder: For the other text encoders; None: the model takes text_features
        only.
      pretrained_image_encoder: For the image encoders other than "cnn".
      axis_name: Device axis of training; None for inference.

    Raises:
      ValueError: The image size does not fit the generator or the poolings, or the U-Net has no
        such block.
    """
    config = {**DEFAULTS, **config}
    size, num_levels, width = config["image_size"], config["num_levels"], config["width"]
    check_size(size, num_levels, config["pseudo_image"])
    dtype, bmf = jnp.dtype(config["dtype"]), {**DEFAULTS["bmf"], **config["bmf"]}
    model = BiCLIP(
        image_size=size,
        widths=tuple(width * 2**i for i in range(num_levels)),
        norm=config["norm"],
        remat=config["remat"],
        encoder_widths=(width, 4 * width),
        cycle_widths=(width // 2, width),
        pseudo_image=config["pseudo_image"],
        pseudo_contrast=config["pseudo_contrast"],
        vision_to_text=bmf["vision_to_text"],
        text_to_vision=bmf["text_to_vision"],
        levels=named_blocks(bmf["levels"], num_levels),
        level_hidden=bmf["hidden"],
        zero_init=bmf["zero_init"],
        no_text=config["text"].get("dropout", 0) > 0,
        heads=tuple(config["heads"]),
        iac_blocks=tuple(config["iac_blocks"]),
        pretrained_image_encoder=pretrained_image_encoder,
        axis_name=axis_name,
        dtype=dtype,
    )
    if not model.uses_text:
        return model
    text_encoder = _text_encoder(config["text"], vocab_size, pretrained_text_encoder, dtype)
    return model.clone(text_encoder=text_encoder)


def named_blocks(names: str, num_levels: int) -> tuple[str, ...]:
    """Returns the selected blocks of the U-Net in data-flow order.

    Args:
      names: Comma-separated names of `unet.block_names`, or all, encoder, bottleneck, decoder for
        a group of blocks; empty for none.
      num_levels: Number of levels of the U-Net.

    Raises:
      ValueError: Unknown block.
    """
    blocks = block_names(num_levels)
    groups = {
        "all": blocks,
        "encoder": blocks[: num_levels - 1],
        "bottleneck": blocks[num_levels - 1 : num_levels],
        "decoder": blocks[num_levels:],
    } | {block: (block,) for block in blocks}
    requested = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in requested if name not in groups]
    if unknown:
        raise ValueError(f"unknown U-Net block {unknown[0]!r}; expected one of {', '.join(groups)}")
    selected = {block for name in requested for block in groups[name]}
    return tuple(block for block in blocks if block in selected)


def check_size(size: int, num_levels: int, pseudo_image: bool) -> None:
    """Raises ValueError if the levels or the generator cannot have this image size."""
    divisor = 2 ** (num_levels - 1)
    if pseudo_image:
        valid = [side for side in fusion.generator_sizes() if side % divisor == 0]
        if size not in valid:
            raise ValueError(
                f"image_size is {size}; expected one of {valid} with {num_levels} levels"
            )
    elif size % divisor:
        raise ValueError(
            f"image_size is {size}; expected a multiple of {divisor} with {num_levels} levels"
        )


def _text_encoder(
    text: Mapping[str, Any], vocab_size: int, pretrained: nn.Module | None, dtype: Any
) -> nn.Module | None:
    if text["encoder"] != "scratch":
        return None if pretrained is None else PooledTextEncoder(pretrained, text["pooling"])
    return TextEncoder(
        vocab_size, text["max_length"], text["width"], text["num_layers"], text["num_heads"], dtype
    )
