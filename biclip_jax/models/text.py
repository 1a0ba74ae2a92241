"""The scratch text encoder: a small transformer over the captions' own words."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from biclip_jax.models.layers import full_precision, gelu


class TextEncoder(nn.Module):
    """A pre-norm transformer; gives the masked mean of its last layer, [CLS] included.

    Attributes:
      vocab_size: number of token ids; 0 is padding.
      max_length: longest legal sequence.
      width, num_layers, num_heads: of the transformer; the MLP is 4 x width.
    """

    vocab_size: int
    max_length: int = 32
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, text_ids: Int[Array, "b l"], text_mask: Bool[Array, "b l"]
    ) -> Float[Array, "b d"]:
        table = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=table, name="words")(text_ids)
        x = x + self.param("positions", table, (self.max_length, self.width))[: x.shape[1]]
        x = x.astype(self.dtype)
        for i in range(self.num_layers):
            x = TransformerBlock(self.num_heads, self.dtype, name=f"block_{i}")(x, text_mask)
        x = nn.LayerNorm(epsilon=1e-5, name="norm")(full_precision(x))
        weight = text_mask[..., None].astype(x.dtype)
        return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)


class TransformerBlock(nn.Module):
    """Self-attention over the unmasked tokens, then a GELU MLP, both residual and pre-norm."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], text_mask: Bool[Array, "b l"]
    ) -> Float[Array, "b l d"]:
        width = x.shape[-1]
        h = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_0")(x)
        attend = nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype, name="attention")
        x = x + attend(h, mask=text_mask[:, None, None, :])
        h = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_1")(x)
        h = gelu(nn.Dense(4 * width, dtype=self.dtype, name="mlp_in")(h))
        return x + nn.Dense(width, dtype=self.dtype, name="mlp_out")(h)
