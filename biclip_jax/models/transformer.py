"""Transformer blocks shared by the towers: attention, and the two orders of norm and residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from biclip_jax.models.layers import full_precision, gelu


def quick_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """x sigmoid(1.702 x), the activation that OpenAI's CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "quick_gelu": quick_gelu}


def interpolate_positions(table: Float[Array, "n d"], grid: tuple[int, int]) -> Float[Array, "m d"]:
    """A table of 1 + g^2 positions for another grid: bicubic, the first row kept.

    Args:
      table: the position of the class token (or of the mean), then g x g in rows.
      grid: rows and columns that are wanted.
    """
    side = round((len(table) - 1) ** 0.5)
    if grid == (side, side):
        return table
    width = table.shape[1]
    patches = jax.image.resize(
        table[1:].reshape(side, side, width),
        (*grid, width),
        jax.image.ResizeMethod.CUBIC_PYTORCH,
        antialias=False,
    )
    return jnp.concatenate([table[:1], patches.reshape(-1, width)])


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(d)) V; one product makes Q, K and V.

    Attributes:
      num_heads: divides the width.
      dtype: of the computation; the softmax is float32 or wider.
    """

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "#b 1 #l l"] | None = None
    ) -> Float[Array, "b l d"]:
        """`mask` (B, 1, queries, keys) is true where a key is seen."""
        b, length, width = x.shape
        qkv = nn.Dense(3 * width, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(b, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)
        scores = full_precision(query @ key.swapaxes(-1, -2)) * (width // self.num_heads) ** -0.5
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        mixed = jax.nn.softmax(scores, axis=-1).astype(value.dtype) @ value
        mixed = mixed.transpose(0, 2, 1, 3).reshape(b, length, width)
        return nn.Dense(width, dtype=self.dtype, name="out")(mixed)


class Block(nn.Module):
    """Attention and an MLP, both residual, with two LayerNorms.

    Attributes:
      num_heads: of the attention.
      mlp_width: hidden width of the MLP.
      activation: a name of `ACTIVATIONS`.
      epsilon: of the LayerNorms.
      post_norm: false: x + f(norm(x)), as in CLIP; true: norm(x + f(x)), as in BERT.
      dtype: of the computation.
    """

    num_heads: int
    mlp_width: int
    activation: str = "gelu"
    epsilon: float = 1e-5
    post_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "#b 1 #l l"] | None = None
    ) -> Float[Array, "b l d"]:
        attention = Attention(self.num_heads, self.dtype, name="attention")
        mlp_in = nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")
        mlp_out = nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")
        norm_0 = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm_0")
        norm_1 = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm_1")
        activation = ACTIVATIONS[self.activation]
        if self.post_norm:
            x = norm_0(x + attention(x, mask))
            return norm_1(x + mlp_out(activation(mlp_in(x))))
        x = x + attention(norm_0(x), mask)
        return x + mlp_out(activation(mlp_in(norm_1(x))))
