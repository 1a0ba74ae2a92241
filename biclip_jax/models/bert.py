"""BERT-base as text tower: CXR-BERT, PubMedBERT, BiomedBERT (Devlin et al., arXiv 1810.04805)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from biclip_jax.models.layers import dense, gelu
from biclip_jax.models.transformer import Block


class Bert(nn.Module):
    """Post-norm transformer over word, position and segment embeddings; no dropout.

    Attributes:
      vocab_size, max_length, num_segments: rows of the three embedding tables.
      width, num_layers, num_heads, mlp_width: of the transformer.
      projection_size: of CXR-BERT's projection head (Boecking et al., arXiv
        2204.09817); 0: no head.
      activation, epsilon: of the blocks.
      dtype: of the computation.
    """

    vocab_size: int = 30522
    max_length: int = 512
    num_segments: int = 2
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    projection_size: int = 0
    activation: str = "gelu"
    epsilon: float = 1e-12
    dtype: Any = jnp.float32

    @property
    def embedding_size(self) -> int:
        """Length of the sentence's embedding."""
        return self.projection_size or self.width

    def setup(self):
        table = nn.initializers.normal(0.02)
        self.words = nn.Embed(self.vocab_size, self.width, embedding_init=table)
        self.positions = self.param("positions", table, (self.max_length, self.width))
        self.segments = self.param("segments", table, (self.num_segments, self.width))
        self.norm = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype)
        self.blocks = [
            Block(
                self.num_heads,
                self.mlp_width,
                self.activation,
                self.epsilon,
                post_norm=True,
                dtype=self.dtype,
            )
            for _ in range(self.num_layers)
        ]
        if self.projection_size:
            self.projection = ProjectionHead(self.projection_size, dtype=self.dtype)

    def __call__(
        self, text_ids: Int[Array, "b l"], text_mask: Bool[Array, "b l"]
    ) -> tuple[Float[Array, "b e"], dict[str, Any]]:
        """Sentences to embeddings.

        Args:
          text_ids: with [CLS] first; at most `max_length` of them.
          text_mask: true at tokens, false at padding, which no token sees.

        Returns:
          The projected state of [CLS] (B, projection_size), or without a head the
          state itself (B, width); and hidden_states, num_layers + 1 of
          (B, L, width), the embeddings first.
        """
        x = self.embed(text_ids)
        mask = text_mask[:, None, None, :]
        hidden_states = [x]
        for block in self.blocks:
            x = block(x, mask)
            hidden_states.append(x)
        embedding = self.projection(x[:, 0]) if self.projection_size else x[:, 0]
        return embedding, {"hidden_states": tuple(hidden_states)}

    def embed(self, text_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """The normalised sum of the embeddings; every token is of the first segment."""
        length = text_ids.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} tokens; the tower has {self.max_length} positions")
        x = self.words(text_ids) + self.positions[:length] + self.segments[0]
        return self.norm(x)


class ProjectionHead(nn.Module):
    """CXR-BERT's head: linear, exact GELU, LayerNorm, linear."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
        x = gelu(dense(self.features, self.dtype, name="hidden")(x))
        x = nn.LayerNorm(epsilon=1e-12, dtype=self.dtype, name="norm")(x)
        return dense(self.features, self.dtype, name="out")(x)


def build(config: Mapping[str, Any], dtype: str = "float32") -> Bert:
    """The tower that a `config.json` of a converted folder describes: `Bert`'s attributes."""
    return Bert(**config, dtype=jnp.dtype(dtype))
