"""Transformer blocks shared by the encoders: attention, and pre-norm or post-norm residuals."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from biclip_jax.models.layers import Dense, LayerNorm, full_precision, gelu, product


def quick_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Computes x sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * nn.sigmoid(1.702 * x)


# Added to the score of a masked key; in float32 it absorbs the score.
HIDDEN = -1e30

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "quick_gelu": quick_gelu}


def interpolate_positions(table: Float[Array, "n d"], grid: tuple[int, int]) -> Float[Array, "m d"]:
    """Interpolates a table of 1 + g^2 positions to another grid; bicubic, the first row is kept.

    Args:
      table: Position of the class token (or of the mean), then g x g positions in row-major order.
      grid: Number of rows and columns of the new grid.

    Returns:
      The table (1 + rows * columns, D).
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


def drop(x: Float[Array, "b ..."], keys: Key[Array, " b"], rate: float) -> Float[Array, "b ..."]:
    """Applies dropout with one key per example; kept values are scaled by 1 / (1 - rate)."""
    keep = jax.vmap(partial(_keep_mask, shape=x.shape[1:], rate=rate))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


def _keep_mask(key, shape, rate):
    # 16 random bits per value: on CPU, dropout spends most of its time generating them.
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2),))
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]
    return (bits >= round(rate * 2**16)).reshape(shape)


def fold_keys(keys: Key[Array, " b"], number: int) -> Key[Array, " b"]:
    """Folds a number into every key of a batch."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


class Projections(nn.Module):
    """Query, key and value projections with one kernel; a call can compute a subset of them."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], first: int = 0, last: int = 3
    ) -> tuple[Array, ...]:
        """Computes the parts first, ..., last - 1 of (query, key, value), each (B, L, D)."""
        width = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, 3 * width))
        bias = self.param("bias", nn.initializers.zeros, (3 * width,))
        part = slice(first * width, last * width)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel[:, part], bias[part], dtype=self.dtype)
        return tuple(jnp.split(product(x, kernel) + bias, last - first, axis=-1))


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(d)) V, with one product for Q, K and V.

    Attributes:
      num_heads: Number of heads; divides the width.
      dropout: Dropout rate of the attention weights; applied only if keys are passed.
      dtype: Dtype of the computation; the softmax uses float32 or wider.
    """

    num_heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "#b 1 #q l"] | None = None,
        queries: Float[Array, "b q d"] | None = None,
        keys: Key[Array, " b"] | None = None,
        values_only: bool = False,
    ) -> Float[Array, "b q d"]:
        """Attends to `x`.

        Args:
          x: Tokens to attend to.
          mask: (B, 1, queries, keys), true where a query may attend to a key.
          queries: Rows of `x` to compute outputs for; None computes all.
          keys: Dropout keys, one per example; None disables dropout.
          values_only: Returns the projected value of every token instead of the attention output.
        """
        project = Projections(self.dtype, name="qkv")
        out = Dense(x.shape[-1], dtype=self.dtype, name="out")
        if values_only:
            return out(*project(x, 2, 3))
        if queries is None:
            query, key, value = project(x)
        else:
            (query,), (key, value) = project(queries, 0, 1), project(x, 1, 3)
        query, key, value = (self._split_heads(part) for part in (query, key, value))
        scores = full_precision((query * query.shape[-1] ** -0.5) @ key.swapaxes(1, 2))
        if mask is not None:
            scores = scores + self._mask_bias(mask)
        # Normalise after the product with the values: fewer divisions, and one kernel on CPU.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        if keys is not None and self.dropout:
            weights = self._drop(weights, keys)
        mixed = ((weights.astype(value.dtype) @ value) / total).astype(self.dtype)
        return out(self._merge_heads(mixed))

    def _split_heads(self, x):
        """Reshapes (B, L, D) to (B * heads, L, D / heads)."""
        b, length, width = x.shape
        x = x.reshape(b, length, self.num_heads, width // self.num_heads).transpose(0, 2, 1, 3)
        return x.reshape(-1, *x.shape[2:])

    def _merge_heads(self, x):
        """Inverts `_split_heads`."""
        _, length, width = x.shape
        x = x.reshape(-1, self.num_heads, length, width).transpose(0, 2, 1, 3)
        return x.reshape(*x.shape[:2], self.num_heads * width)

    def _mask_bias(self, mask):
        """Returns the bias added to the scores, (1 or B * heads, #Q, L)."""
        mask = mask[:, 0]
        mask = mask if len(mask) == 1 else jnp.repeat(mask, self.num_heads, axis=0)
        return jnp.where(mask, 0.0, HIDDEN)

    def _drop(self, weights, keys):
        by_example = weights.reshape(-1, self.num_heads, *weights.shape[1:])
        return drop(by_example, keys, self.dropout).reshape(weights.shape)


class Block(nn.Module):
    """Attention and an MLP, both residual, with two LayerNorms.

    Attributes:
      num_heads: Number of attention heads.
      mlp_width: Hidden width of the MLP.
      activation: Key of `ACTIVATIONS`.
      epsilon: Epsilon of the LayerNorms.
      post_norm: False computes x + f(norm(x)), as in CLIP; true computes norm(x + f(x)), as in
        BERT.
      dropout: Dropout rate of the attention weights and of both residual branches; applied only if
        keys are passed.
      dtype: Dtype of the computation.
    """

    num_heads: int
    mlp_width: int
    activation: str = "gelu"
    epsilon: float = 1e-5
    post_norm: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "#b 1 #l l"] | None = None,
        row: Int[Array, " b"] | None = None,
        keys: Key[Array, " b"] | None = None,
        values_only: bool = False,
    ) -> Float[Array, "b q d"]:
        """Applies the block.

        Args:
          x: Token states.
          mask: (B, 1, queries, keys), true where a query may attend to a key.
          row: Index of the only token of each example to compute, which gives (B, 1, D); None
            computes all tokens, (B, L, D).
          keys: Dropout keys, one per example; None disables dropout.
          values_only: Returns only the projected value of every token.
        """
        attention = Attention(self.num_heads, self.dropout, self.dtype, name="attention")
        mlp_in = Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")
        mlp_out = Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")
        norm_0 = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm_0")
        norm_1 = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm_1")
        activation = ACTIVATIONS[self.activation]
        normalized = x if self.post_norm else norm_0(x)
        if values_only:
            return attention(normalized, values_only=True)
        queries = None
        if row is not None:
            x, queries = (states[jnp.arange(len(x)), row][:, None] for states in (x, normalized))
            mask = _mask_row(mask, row)
        dropout = partial(_residual_dropout, keys=keys, rate=self.dropout)
        attention_keys = None if keys is None else fold_keys(keys, 0)
        x = x + dropout(attention(normalized, mask, queries, attention_keys), site=1)
        x = norm_0(x) if self.post_norm else x
        hidden = mlp_in(x if self.post_norm else norm_1(x))
        x = x + dropout(mlp_out(activation(hidden)), site=2)
        return norm_1(x) if self.post_norm else x


def _mask_row(mask, row):
    """Returns the mask of one query per example; a mask shared by all queries is unchanged."""
    if mask is None or mask.shape[2] == 1:
        return mask
    mask = jnp.broadcast_to(mask, (len(row), *mask.shape[1:]))
    return mask[jnp.arange(len(row)), :, row][:, :, None]


def _residual_dropout(x, *, keys, rate, site):
    return x if keys is None or not rate else drop(x, fold_keys(keys, site), rate)
