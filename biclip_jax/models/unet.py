"""The U-Net of the published network, with optional text conditioning at any block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from biclip_jax.models.fusion import LevelFusion
from biclip_jax.models.layers import (
    BatchNorm,
    UpConv2x2,
    conv1x1,
    conv3x3,
    full_precision,
    max_pool_2x2,
)

GROUPS = 8  # largest number of groups of GroupNorm; fewer if 8 does not divide the channels


def block_names(num_levels: int) -> tuple[str, ...]:
    """Returns the block names in data-flow order; the last encoder block is the bottleneck."""
    down = [f"encoder_{level}" for level in range(num_levels)]
    return (*down, *(f"decoder_{level}" for level in reversed(range(num_levels - 1))))


class DoubleConv(nn.Module):
    """(3x3 convolution without bias, norm, ReLU) twice; `norm` is "batch" or "group"."""

    features: int
    norm: str = "batch"
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w d"]:
        for i in range(2):
            x = conv3x3(self.features, self.dtype, use_bias=False, name=f"conv_{i}")(x)
            x = nn.relu(self._normalize(x, train, f"norm_{i}"))
        return x

    def _normalize(self, x, train, name):
        if self.norm == "batch":
            return BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=name)(x, train)
        groups = math.gcd(GROUPS, self.features)
        return nn.GroupNorm(groups, epsilon=1e-5, dtype=self.dtype, name=name)(x)


class UNet(nn.Module):
    """Encoder, bottleneck and decoder with `len(widths) - 1` poolings.

    Attributes:
      widths: Channels of the levels, from full resolution to the bottleneck; each is twice the
        previous one because an up-convolution halves the channels.
      norm: "batch" or "group".
      fused_blocks: Names of the text-conditioned blocks, see `block_names`.
      vision_to_text, text_to_vision, fusion_hidden, zero_init: Fields of `fusion.LevelFusion`.
      axis_name: Device axis over which BatchNorm computes its statistics.
      dtype: Dtype of the computation; parameters are float32.
      remat: Whether the backward pass recomputes each block instead of storing its activations.
    """

    widths: Sequence[int] = (64, 128, 256, 512, 1024)
    norm: str = "batch"
    fused_blocks: Sequence[str] = ()
    vision_to_text: bool = True
    text_to_vision: bool = True
    fusion_hidden: int = 256
    zero_init: bool = False
    axis_name: str | None = None
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        train: bool,
        text: Float[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b h w 1"], dict[str, Array]]:
        """Computes logits (B, H, W, 1) and {name: features} of the decoder blocks.

        The features of decoder_0, the last block, are (B, H, W, widths[0]). H and W must be
        divisible by 2 ** (len(widths) - 1). `text` is required if `fused_blocks` is not empty.
        """
        skips, features = [], {}
        for level, width in enumerate(self.widths):
            x = max_pool_2x2(x) if level else x
            x, text = self._block(f"encoder_{level}", width, x, train, text)
            skips.append(x)
        skips.pop()
        for level, width in reversed(list(enumerate(self.widths[:-1]))):
            x = UpConv2x2(width, dtype=self.dtype, name=f"up_{level}")(x)
            x = jnp.concatenate([skips[level], x], axis=-1)
            x, text = self._block(f"decoder_{level}", width, x, train, text)
            features[f"decoder_{level}"] = x
        logits = conv1x1(1, full_precision(x).dtype, name="head")(x)
        return logits, features

    def _block(self, name, width, x, train, text):
        block = nn.remat(DoubleConv, static_argnums=(2,)) if self.remat else DoubleConv
        x = block(width, self.norm, self.axis_name, self.dtype, name=name)(x, train)
        if name not in self.fused_blocks:
            return x, text
        fuse = LevelFusion(
            self.vision_to_text,
            self.text_to_vision,
            self.fusion_hidden,
            self.zero_init,
            self.dtype,
            name=f"fusion_{name}",
        )
        return fuse(x, text)
