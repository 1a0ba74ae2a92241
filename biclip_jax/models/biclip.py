"""BiCLIP (arXiv 2603.00156) assembled: fuse, then segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from biclip_jax.models import fusion
from biclip_jax.models.layers import full_precision
from biclip_jax.models.text import PooledTower, TextEncoder
from biclip_jax.models.unet import UNet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PSEUDO_MEAN, PSEUDO_STD = 0.5, 0.25


class Fused(NamedTuple):
    """What the fusion gives.

    Attributes:
      text: (B, 784) the projected sentence t.
      refined_text: (B, 784) t' = t + g([t; i]).
      pseudo_image: (B, H, W, 3) in [0, 1], the sentence as a picture.
      cycle_text: (B, 784) the sentence read back from the pseudo-image; None outside training.
    """

    text: Float[Array, "b t"]
    refined_text: Float[Array, "b t"]
    pseudo_image: Float[Array, "b h w 3"]
    cycle_text: Float[Array, "b t"] | None


class TwoViews(NamedTuple):
    """Logits (B, H, W, 1) of the weak view, and the embeddings (B, 256) of both."""

    weak_logits: Float[Array, "b h w 1"]
    weak_embedding: Float[Array, "b p"]
    strong_embedding: Float[Array, "b p"]


class BiCLIP(nn.Module):
    """The network `published` with this paper.

    Pictures are float32 in [0, 1], (B, H, W, 3), H = W = image_size; every
    normalisation after that happens here. A sentence comes either as
    `text_ids` and `text_mask` (B, L), or as `text_features` (B, D), the pooled
    output of a frozen text tower.

    Attributes:
      image_size: 28 * 2^k, divisible by 2 to the number of poolings.
      widths: channels of the U-Net's levels.
      encoder_widths, cycle_widths: channels of the image encoder and of the cycle head.
      text_encoder: maps (ids, mask) to (B, D); None where features are given.
      axis_name: device axis for BatchNorm's statistics in training.
      dtype: of the computation; parameters, statistics, logits are float32.
    """

    image_size: int = 224
    widths: Sequence[int] = (64, 128, 256, 512, 1024)
    encoder_widths: Sequence[int] = (64, 256)
    cycle_widths: Sequence[int] = (32, 64)
    text_encoder: nn.Module | None = None
    axis_name: str | None = None
    dtype: Any = jnp.float32

    def setup(self):
        self.text_projection = fusion.TextMLP(dtype=self.dtype)
        self.image_encoder = fusion.ImageEncoder(self.encoder_widths, dtype=self.dtype)
        self.refiner = fusion.TextRefiner(dtype=self.dtype)
        self.generator = fusion.Generator(self.image_size, dtype=self.dtype)
        self.cycle_head = fusion.CycleHead(widths=self.cycle_widths, dtype=self.dtype)
        self.unet = UNet(self.widths, axis_name=self.axis_name, dtype=self.dtype)
        self.consistency_head = fusion.ConsistencyHead()

    def __call__(
        self,
        image: Float[Array, "b h w 3"],
        text_ids: Int[Array, "b l"] | None = None,
        text_mask: Bool[Array, "b l"] | None = None,
        text_features: Float[Array, "b d"] | None = None,
    ) -> tuple[Float[Array, "b h w 1"], dict[str, Array]]:
        """Inference: one pass; returns logits and the named intermediates.

        The intermediates are text, refined_text, pseudo_image (see `Fused`) and
        features (B, H, W, widths[0]), the decoder's last.
        """
        if self.is_initializing():
            self._touch_training_heads()
        fused = self.fuse(image, text_ids, text_mask, text_features)
        logits, features = self.segment(image, fused.pseudo_image)
        return logits, {
            "text": fused.text,
            "refined_text": fused.refined_text,
            "pseudo_image": fused.pseudo_image,
            "features": features,
        }

    def fuse(
        self,
        image: Float[Array, "b h w 3"],
        text_ids: Int[Array, "b l"] | None = None,
        text_mask: Bool[Array, "b l"] | None = None,
        text_features: Float[Array, "b d"] | None = None,
        train: bool = False,
    ) -> Fused:
        """The picture refines the sentence, the sentence becomes a pseudo-image."""
        if text_features is None:
            if self.text_encoder is None:
                raise ValueError("this model has no text encoder; give text_features")
            text_features = self.text_encoder(text_ids, text_mask)
        text = full_precision(self.text_projection(text_features))
        refined_text = full_precision(self.refiner(text, self.image_encoder(image)))
        pseudo_image = self.generator(refined_text)
        cycle_text = self.cycle_head(pseudo_image) if train else None
        return Fused(text, refined_text, pseudo_image, cycle_text)

    def segment(
        self,
        image: Float[Array, "b h w 3"],
        pseudo_image: Float[Array, "b h w 3"],
        train: bool = False,
    ) -> tuple[Float[Array, "b h w 1"], Float[Array, "b h w d"]]:
        """Picture and pseudo-image, each in [0, 1], to logits and decoder features."""
        image = (image - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
        pseudo_image = (pseudo_image - PSEUDO_MEAN) / PSEUDO_STD
        return self.unet(jnp.concatenate([image, pseudo_image], axis=-1), train)

    def two_views(
        self,
        weak: tuple[Float[Array, "b h w 3"], Float[Array, "b h w 3"]],
        strong: tuple[Float[Array, "b h w 3"], Float[Array, "b h w 3"]],
    ) -> TwoViews:
        """Training: both views, each a (picture, pseudo-image) in [0, 1].

        The weak one goes first: BatchNorm's running statistics take both in turn.
        """
        weak_logits, weak_features = self.segment(*weak, train=True)
        _, strong_features = self.segment(*strong, train=True)
        return TwoViews(
            weak_logits,
            self.consistency_head(weak_features),
            self.consistency_head(strong_features),
        )

    def _touch_training_heads(self):
        """Creates the parameters that only training uses, so that one init makes them all."""
        size = self.image_size
        self.cycle_head(jnp.zeros((1, size, size, 3)))
        self.consistency_head(jnp.zeros((1, 1, 1, self.widths[0])))


def to_unit_rgb(image: Array) -> Float[Array, "b h w 3"]:
    """uint8 (B, H, W, 1 or 3) to float32 (B, H, W, 3) in [0, 1]."""
    image = image.astype(jnp.float32) / 255
    return jnp.broadcast_to(image, (*image.shape[:3], 3))


def text_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The sentence as the model takes it: ids and mask, or a frozen tower's features."""
    names = ("text_features",) if "text_features" in batch else ("text_ids", "text_mask")
    return {name: batch[name] for name in names}


def init(model: BiCLIP, key: Key[Array, ""], text: Mapping[str, Array]) -> dict[str, Any]:
    """Fresh variables (params, batch_stats), training heads included; float32.

    Args:
      model: with a text encoder where `text` holds ids.
      key: of the parameters.
      text: of one sentence, as the model takes it; see `text_inputs`.
    """
    size = model.image_size
    return jax.jit(model.init)(key, jnp.zeros((1, size, size, 3)), **text)


def build(
    config: Mapping[str, Any],
    *,
    vocab_size: int = 0,
    tower: nn.Module | None = None,
    axis_name: str | None = None,
) -> BiCLIP:
    """The model that a resolved `model` configuration describes.

    Args:
      config: fields image_size, width, num_levels, dtype and text.{encoder,
        pooling, width, num_layers, num_heads, max_length}; see `configs/common.py`.
      vocab_size: of the tokenizer, for the scratch text encoder.
      tower: pretrained, for the other text encoders; None: the model takes
        text_features alone.
      axis_name: device axis of training; None for inference.

    Raises:
      ValueError: an image size that the generator or the poolings cannot make.
    """
    size, levels, width = config["image_size"], config["num_levels"], config["width"]
    fusion.generator_widths(size)
    if size % 2 ** (levels - 1):
        raise ValueError(
            f"image_size is {size}; {levels} levels need a multiple of {2 ** (levels - 1)}"
        )
    dtype = jnp.dtype(config["dtype"])
    return BiCLIP(
        image_size=size,
        widths=tuple(width * 2**i for i in range(levels)),
        encoder_widths=(width, 4 * width),
        cycle_widths=(width // 2, width),
        text_encoder=_text_encoder(config["text"], vocab_size, tower, dtype),
        axis_name=axis_name,
        dtype=dtype,
    )


def _text_encoder(
    text: Mapping[str, Any], vocab_size: int, tower: nn.Module | None, dtype: Any
) -> nn.Module | None:
    if text["encoder"] != "scratch":
        return None if tower is None else PooledTower(tower, text["pooling"])
    return TextEncoder(
        vocab_size, text["max_length"], text["width"], text["num_layers"], text["num_heads"], dtype
    )
