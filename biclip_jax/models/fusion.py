"""Bidirectional multimodal fusion (BMF): what passes between the picture and the sentence."""

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

SEED_SIZE = 28  # the refined sentence is read as a SEED_SIZE x SEED_SIZE map
TEXT_DIM = SEED_SIZE**2


class TextMLP(nn.Module):
    """Linear, LayerNorm, GELU, Linear: the text projection and the refiners are all this.

    Attributes:
      features: of the output.
      hidden: between the two layers; None: as many as `features`.
      zero_start: whether the output begins at zero.
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
    """Vision to text: t' = t + g([t; i]); the fields are those of `TextMLP`."""

    hidden: int | None = None
    zero_init: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, text: Float[Array, "b t"], image_embedding: Float[Array, "b i"]
    ) -> Float[Array, "b t"]:
        both = jnp.concatenate([text, image_embedding], axis=-1)
        mlp = TextMLP(text.shape[-1], self.hidden, self.zero_init, self.dtype, name="mlp")
        return text + full_precision(mlp(both))


class LevelFusion(nn.Module):
    """BMF at one level of the U-Net: vision to text, then text to vision.

    t_l = t_{l-1} + g_l([t_{l-1}; mean(F_l)]);  F_l' = F_l (1 + gamma_l(t_l)) + beta_l(t_l).
    gamma and beta begin at zero, so that training begins at the plain U-Net.

    Attributes:
      vision_to_text, text_to_vision: each direction can be off.
      hidden: of g_l.
      zero_start: whether g_l begins at zero, so that the sentence comes through unchanged.
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
    """Two 3x3 convolutions and a global mean: the picture's embedding i."""

    widths: Sequence[int] = (64, 256)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b i"]:
        x = image
        for i, width in enumerate(self.widths):
            x = nn.relu(conv3x3(width, self.dtype, name=f"conv_{i}")(x))
        return full_precision(x).mean(axis=(1, 2))


class Generator(nn.Module):
    """Text to vision: the refined sentence becomes a pseudo-image in [0, 1].

    Attributes:
      image_size: of the pseudo-image.
      contrast: whether its kernels begin so that the sentence's variance comes through; the
        published ones let so little of it through that the pseudo-image begins as an even grey.
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
    """Hidden channels of the generator: k doublings of 28 need the last k - 1 of (64, 32, 16, 8).

    Raises:
      ValueError: the size is not 28 * 2^k with k from 1 to 5.
    """
    legal = generator_sizes()
    if image_size not in legal:
        raise ValueError(f"image_size is {image_size}; expected one of {legal}")
    return (64, 32, 16, 8)[4 - legal.index(image_size) :]


def generator_sizes() -> list[int]:
    """The sizes of a pseudo-image: 28 * 2^k with k from 1 to 5."""
    return [SEED_SIZE * 2**k for k in range(1, 6)]


class CycleHead(nn.Module):
    """Reads the sentence back from the pseudo-image: t^ = h(x^). Training only."""

    features: int = TEXT_DIM
    widths: Sequence[int] = (32, 64)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pseudo_image: Float[Array, "b h w 3"]) -> Float[Array, "b t"]:
        x = ImageEncoder(self.widths, self.dtype, name="encoder")(pseudo_image)
        return full_precision(dense(self.features, self.dtype, name="out")(x))


class ConsistencyHead(nn.Module):
    """Image augmentation consistency (IAC): decoder features to a normalised embedding."""

    features: int = 256

    @nn.compact
    def __call__(self, features: Float[Array, "b h w d"]) -> Float[Array, "b p"]:
        pooled = full_precision(features).mean(axis=(1, 2))
        embedding = dense(self.features, None, name="out")(pooled)
        return LayerNorm(epsilon=1e-5, name="norm")(embedding)
