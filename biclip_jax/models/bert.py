"""BERT-base text encoder: CXR-BERT, PubMedBERT, BiomedBERT (Devlin et al., arXiv 1810.04805)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from biclip_jax.models.layers import Dense, LayerNorm, dense, gelu
from biclip_jax.models.transformer import Block, drop, fold_keys


class Bert(nn.Module):
    """Post-norm transformer over word, position and segment embeddings.

    Attributes:
      vocab_size, max_length, num_segments: Rows of the three embedding tables.
      width, num_layers, num_heads, mlp_width: Sizes of the transformer.
      projection_size: Size of the projected embedding; 0: no projection head.
      projection_kind: "cxr_bert" (Boecking et al., arXiv 2204.09817), or "mlp", as in UniMedCLIP
        and BiomedCLIP.
      activation, epsilon: Fields of the blocks.
      dropout: Dropout rate of the embeddings and blocks; applied only if keys are passed.
      dtype: Dtype of the computation.
    """

    vocab_size: int = 30522
    max_length: int = 512
    num_segments: int = 2
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    projection_size: int = 0
    projection_kind: str = "cxr_bert"
    activation: str = "gelu"
    epsilon: float = 1e-12
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @property
    def embedding_size(self) -> int:
        """Size of the text embedding."""
        return self.projection_size or self.width

    def setup(self):
        table = nn.initializers.normal(0.02)
        self.words = nn.Embed(self.vocab_size, self.width, embedding_init=table)
        self.positions = self.param("positions", table, (self.max_length, self.width))
        self.segments = self.param("segments", table, (self.num_segments, self.width))
        self.norm = LayerNorm(epsilon=self.epsilon, dtype=self.dtype)
        self.blocks = [
            Block(
                self.num_heads,
                self.mlp_width,
                self.activation,
                self.epsilon,
                post_norm=True,
                dropout=self.dropout,
                dtype=self.dtype,
            )
            for _ in range(self.num_layers)
        ]
        if self.projection_size:
            head = ProjectionMLP if self.projection_kind == "mlp" else ProjectionHead
            self.projection = head(self.projection_size, dtype=self.dtype)

    def __call__(
        self, text_ids: Int[Array, "b l"], text_mask: Bool[Array, "b l"] | None = None
    ) -> tuple[Float[Array, "b e"], dict[str, Any]]:
        """Computes text embeddings.

        Args:
          text_ids: Token ids, [CLS] first; at most `max_length` per example.
          text_mask: True at tokens, false at padding, which no token attends to; None: [PAD] is id
            0.

        Returns:
          The projected state of [CLS] (B, projection_size), or without a head the state itself (B,
          width); and hidden_states, num_layers + 1 arrays of (B, L, width), the embeddings first.
        """
        x = self.embed(text_ids)
        mask = self.attention_mask(text_ids, text_mask)
        hidden_states = [x]
        for block in self.blocks:
            x = block(x, mask)
            hidden_states.append(x)
        return self.pool(x[:, 0]), {"hidden_states": tuple(hidden_states)}

    def pool(self, state: Float[Array, "b d"]) -> Float[Array, "b e"]:
        """Maps the last state of [CLS] to the text embedding."""
        return self.projection(state) if self.projection_size else state

    def summary_row(self, text_ids: Int[Array, "b l"]) -> Int[Array, " b"]:
        """Returns the index of the token that represents the text: [CLS], the first one."""
        return jnp.zeros(len(text_ids), jnp.int32)

    def attention_mask(
        self, text_ids: Int[Array, "b l"], text_mask: Bool[Array, "b l"] | None = None
    ) -> Bool[Array, "b 1 1 l"]:
        """Returns the attention mask: true at every token, false at padding."""
        return (text_ids != 0 if text_mask is None else text_mask)[:, None, None, :]

    def embed(
        self, text_ids: Int[Array, "b l"], keys: Key[Array, " b"] | None = None
    ) -> Float[Array, "b l d"]:
        """Computes the normalised sum of the embeddings; every token is in the first segment.

        Args:
          text_ids: Token ids.
          keys: Dropout keys, one per example; None disables dropout.

        Returns:
          Token states (B, L, D).

        Raises:
          ValueError: More than `max_length` tokens.
        """
        length = text_ids.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} tokens; the text encoder has {self.max_length} positions")
        x = self.norm(self.words(text_ids) + self.positions[:length] + self.segments[0])
        if keys is None or not self.dropout:
            return x
        return drop(x, fold_keys(keys, self.num_layers), self.dropout)


class ProjectionHead(nn.Module):
    """CXR-BERT's head: linear, exact GELU, LayerNorm, linear."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
        x = gelu(dense(self.features, self.dtype, name="hidden")(x))
        x = LayerNorm(epsilon=1e-12, dtype=self.dtype, name="norm")(x)
        return dense(self.features, self.dtype, name="out")(x)


class ProjectionMLP(nn.Module):
    """Head of open_clip's BERT text encoders: linear, exact GELU, linear; no biases."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
        hidden = (x.shape[-1] + self.features) // 2
        x = gelu(Dense(hidden, use_bias=False, dtype=self.dtype, name="hidden")(x))
        return Dense(self.features, use_bias=False, dtype=self.dtype, name="out")(x)


def build(config: Mapping[str, Any], dtype: str = "float32", name: str | None = None) -> Bert:
    """Builds the encoder from the `config.json` of a converted folder: the attributes of `Bert`."""
    return Bert(**config, dtype=jnp.dtype(dtype), name=name)
