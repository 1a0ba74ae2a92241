"""CLIP's ModifiedResNet image encoder (Radford et al., arXiv 2103.00020, section 2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from biclip_jax.models.layers import BatchNorm, Dense, full_precision
from biclip_jax.models.transformer import interpolate_positions


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: three-layer stem, average pooling instead of strides, attention pooling.

    Attributes:
      image_size: Image side that the position table is for; sides are multiples of 32.
      width: Channels after the stem; the last stage has 32 times as many.
      stages: Number of blocks in each of the four stages.
      num_heads: Number of heads of the attention pooling.
      embedding_size: E, size of the joint embedding space.
      dtype: Dtype of the computation.
    """

    image_size: int = 224
    width: int = 64
    stages: Sequence[int] = (3, 4, 6, 3)
    num_heads: int = 32
    embedding_size: int = 1024
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w 3"], train: bool = False
    ) -> tuple[Float[Array, "b e"], dict[str, Any]]:
        """Computes embeddings of normalised images (`clip.MEAN`, `clip.STD`).

        Returns:
          The attention-pooled embedding (B, E); and hidden_states, the maps after the stem and
          after each stage; tokens (B, H/32 W/32, 32 width), the last map flattened.
        """
        x = Stem(self.width, self.dtype, name="stem")(image, train)
        hidden_states = [x]
        for i, num_blocks in enumerate(self.stages):
            for j in range(num_blocks):
                stride = 2 if i > 0 and j == 0 else 1
                block = Bottleneck(self.width * 2**i, stride, self.dtype, name=f"stage_{i}_{j}")
                x = block(x, train)
            hidden_states.append(x)
        pool = AttentionPool(
            self.image_size // 32, self.num_heads, self.embedding_size, self.dtype, name="pool"
        )
        tokens = x.reshape(len(x), -1, x.shape[-1])
        return pool(x), {"hidden_states": tuple(hidden_states), "tokens": tokens}


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, and average pooling; H/4 x W/4."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w 3"], train: bool
    ) -> Float[Array, "b h//4 w//4 c"]:
        x = image.astype(self.dtype)
        for i, (width, stride) in enumerate(
            ((self.width // 2, 2), (self.width // 2, 1), (self.width, 1))
        ):
            x = _conv(width, 3, stride, self.dtype, name=f"conv_{i}")(x)
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f"norm_{i}")(x, train))
        return average_pool_2x2(x)


class Bottleneck(nn.Module):
    """1x1, 3x3, (average pooling) and 1x1 convolution, with a pooled and projected residual."""

    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b i j d"]:
        def norm(name):
            return BatchNorm(dtype=self.dtype, name=name)

        residual, features = x, 4 * self.width
        x = nn.relu(norm("norm_0")(_conv(self.width, 1, 1, self.dtype, "conv_0")(x), train))
        x = nn.relu(norm("norm_1")(_conv(self.width, 3, 1, self.dtype, "conv_1")(x), train))
        x = average_pool_2x2(x) if self.stride == 2 else x
        x = norm("norm_2")(_conv(features, 1, 1, self.dtype, "conv_2")(x), train)
        if self.stride == 2 or residual.shape[-1] != features:
            residual = average_pool_2x2(residual) if self.stride == 2 else residual
            residual = _conv(features, 1, 1, self.dtype, "conv_skip")(residual)
            residual = norm("norm_skip")(residual, train)
        return nn.relu(x + residual)


class AttentionPool(nn.Module):
    """Attention pooling: the mean of the map queries the mean and all positions."""

    side: int
    num_heads: int
    embedding_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
        b, height, wide, width = x.shape
        table = self.param(
            "positions", nn.initializers.normal(width**-0.5), (self.side**2 + 1, width)
        )
        x = x.reshape(b, -1, width)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
        x = x + interpolate_positions(table, (height, wide)).astype(x.dtype)

        def heads(name, x):
            x = Dense(width, dtype=self.dtype, name=name)(x)
            return x.reshape(b, -1, self.num_heads, width // self.num_heads)

        query, key, value = heads("query", x[:, :1]), heads("key", x), heads("value", x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(full_precision(scores), axis=-1).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(b, width)
        return Dense(self.embedding_size, dtype=self.dtype, name="out")(mixed)


def _conv(features: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        name=name,
    )


def average_pool_2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """Computes the mean over 2x2 blocks; H and W must be even."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
