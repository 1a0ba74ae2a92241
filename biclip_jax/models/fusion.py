"""Bidirectional multimodal fusion (BMF) between the image and the text embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from biclip_jax.models.layers import (
    Dense,
    LayerNorm,
    UpConv4x4,
    contrast_uniform,
    conv3x3,
    dense,
    fan_in_uniform,
    full_precision,
    gelu,
)

SEED_SIZE = 28  # the generator reshapes the refined text to SEED_SIZE x SEED_SIZE
TEXT_DIM = SEED_SIZE**2


class TextMLP(nn.Module):
    """Linear, LayerNorm, GELU, Linear; used for the text projection and the refiners.

    Attributes:
      features: Number of output features.
      hidden: Number of hidden features; None: `features`.
      zero_init: Whether the output is zero at initialisation.
      dtype: Dtype of the computation.
    """

    features: int = TEXT_DIM
    hidden: int | None = None
    zero_init: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b f"]:
        x = dense(self.hidden or self.features, self.dtype, name="in")(x)
        x = gelu(LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x))
        return dense(self.features, self.dtype, name="out", zero_init=self.zero_init)(x)


class TextRefiner(nn.Module):
    """Vision to text: t' = t + g([t; i]). The attributes are those of `TextMLP`."""

    hidden: int | None = None
    zero_init: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, text: Float[Array, "b t"], image_embedding: Float[Array, "b i"]
    ) -> Float[Array, "b t"]:
        concatenated = jnp.concatenate([text, image_embedding], axis=-1)
        mlp = TextMLP(text.shape[-1], self.hidden, self.zero_init, self.dtype, name="mlp")
        return text + full_precision(mlp(concatenated))


class LevelFusion(nn.Module):
    """BMF at one level of the U-Net: vision to text, then text to vision (FiLM).

    t_l = t_{l-1} + g_l([t_{l-1}; mean(F_l)]);  F_l' = F_l (1 + gamma_l(t_l)) + beta_l(t_l). gamma
    and beta are zero at initialisation, so training starts from the plain U-Net.

    Attributes:
      vision_to_text, text_to_vision: Whether each direction is enabled.
      hidden: Hidden features of g_l.
      zero_init: Whether g_l is zero at initialisation, which passes the text through unchanged.
      dtype: Dtype of the computation.
    """

    vision_to_text: bool = True
    text_to_vision: bool = True
    hidden: int = 256
    zero_init: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "b h w c"], text: Float[Array, "b t"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b t"]]:
        if self.vision_to_text:
            pooled = full_precision(features).mean(axis=(1, 2))
            refiner = TextRefiner(self.hidden, self.zero_init, self.dtype, name="refiner")
            text = refiner(text, pooled)
        if self.text_to_vision:
            zeros = nn.initializers.zeros
            modulation = Dense(
                2 * features.shape[-1], dtype=self.dtype, kernel_init=zeros, name="modulation"
            )
            gamma, beta = jnp.split(modulation(text)[:, None, None], 2, axis=-1)
            features = features * (1 + gamma) + beta
        return features, text


class ImageEncoder(nn.Module):
    """Two 3x3 convolutions and global average pooling; returns the image embedding i."""

    widths: Sequence[int] = (64, 256)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b i"]:
        x = image
        for i, width in enumerate(self.widths):
            x = nn.relu(conv3x3(width, self.dtype, name=f"conv_{i}")(x))
        return full_precision(x).mean(axis=(1, 2))


class Generator(nn.Module):
    """Text to vision: generates a pseudo-image in [0, 1] from the refined text.

    Attributes:
      image_size: Side of the pseudo-image, in pixels.
      contrast: Whether the initial kernels preserve the variance of the text. The published
        initialisation shrinks it so much that the initial pseudo-image is a uniform grey.
      dtype: Dtype of the computation.
    """

    image_size: int = 224
    contrast: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, refined_text: Float[Array, "b t"]) -> Float[Array, "b h w 3"]:
        hidden = generator_widths(self.image_size)
        x = refined_text.reshape(-1, SEED_SIZE, SEED_SIZE, 1)  # row-major
        init = contrast_uniform if self.contrast else fan_in_uniform
        for i, width in enumerate(hidden):
            x = nn.relu(UpConv4x4(width, init, self.dtype, name=f"up_{i}")(x))
        x = UpConv4x4(3, init, self.dtype, name=f"up_{len(hidden)}")(x)
        return nn.sigmoid(full_precision(x))


def generator_widths(image_size: int) -> tuple[int, ...]:
    """Returns the hidden channels: k doublings of 28 use the last k - 1 of (64, 32, 16, 8).

    Raises:
      ValueError: The size is not 28 * 2^k with k from 1 to 5.
    """
    valid = generator_sizes()
    if image_size not in valid:
        raise ValueError(f"image_size is {image_size}; expected one of {valid}")
    return (64, 32, 16, 8)[4 - valid.index(image_size) :]


def generator_sizes() -> list[int]:
    """Returns the valid sizes of a pseudo-image: 28 * 2^k with k from 1 to 5."""
    return [SEED_SIZE * 2**k for k in range(1, 6)]


class CycleHead(nn.Module):
    """Reconstructs the text embedding from the pseudo-image: t^ = h(x^). Training only."""

    features: int = TEXT_DIM
    widths: Sequence[int] = (32, 64)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pseudo_image: Float[Array, "b h w 3"]) -> Float[Array, "b t"]:
        x = ImageEncoder(self.widths, self.dtype, name="encoder")(pseudo_image)
        return full_precision(dense(self.features, self.dtype, name="out")(x))


class ConsistencyHead(nn.Module):
    """Image augmentation consistency (IAC): maps decoder features to a normalised embedding."""

    features: int = 256

    @nn.compact
    def __call__(self, features: Float[Array, "b h w d"]) -> Float[Array, "b p"]:
        pooled = full_precision(features).mean(axis=(1, 2))
        embedding = dense(self.features, None, name="out")(pooled)
        return LayerNorm(epsilon=1e-5, name="norm")(embedding)
