"""Text encoders with one vector per prompt: trained from scratch, or pretrained and pooled."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from biclip_jax.models.layers import LayerNorm, full_precision
from biclip_jax.models.transformer import Block

POOLINGS = ("all_tokens", "masked", "embedding")


class TextEncoder(nn.Module):
    """Pre-norm transformer; returns the masked mean of its last layer, [CLS] included.

    Attributes:
      vocab_size: Number of token ids; 0 is padding.
      max_length: Largest sequence length.
      width: Width of the transformer; the MLP has 4 x width.
      num_layers, num_heads: Depth and number of attention heads.
      dtype: Dtype of the computation.
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
            block = Block(self.num_heads, 4 * self.width, dtype=self.dtype, name=f"block_{i}")
            x = block(x, text_mask[:, None, None, :])
        x = LayerNorm(epsilon=1e-5, name="norm")(full_precision(x))
        weight = text_mask[..., None].astype(x.dtype)
        return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)


class PooledTextEncoder(nn.Module):
    """Pretrained text encoder reduced to one vector per prompt.

    Attributes:
      pretrained: Module that maps (ids, mask) to (embedding, {"hidden_states": ...}), see
        `models.bert.Bert` and `models.clip.TextTransformer`.
      pooling: "all_tokens" averages the hidden states 1, 2 and last over ALL positions, as
        published; "masked" averages them over the tokens without padding; "embedding" is the
        encoder's projected embedding.
    """

    pretrained: nn.Module
    pooling: str = "all_tokens"

    @property
    def num_features(self) -> int:
        """Length of the pooled vector."""
        return (
            self.pretrained.embedding_size if self.pooling == "embedding" else self.pretrained.width
        )

    @nn.compact
    def __call__(
        self, text_ids: Int[Array, "b l"], text_mask: Bool[Array, "b l"]
    ) -> Float[Array, "b d"]:
        embedding, aux = self.pretrained(text_ids, text_mask)
        if self.pooling == "embedding":
            return full_precision(embedding)
        states = aux["hidden_states"]
        layers = jnp.stack([full_precision(state) for state in (states[1], states[2], states[-1])])
        mean = layers.mean(axis=0)
        if self.pooling == "all_tokens":
            return mean.mean(axis=1)
        weight = text_mask[..., None].astype(mean.dtype)
        return (mean * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
