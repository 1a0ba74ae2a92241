"""Transformer blocks shared by the towers: attention, and the two orders of norm and residual."""

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
    """x sigmoid(1.702 x), the activation that OpenAI's CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


# Added to the score of a key that is not seen: float32 keeps nothing else of the sum.
HIDDEN = -1e30

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


def drop(x: Float[Array, "b ..."], keys: Key[Array, " b"], rate: float) -> Float[Array, "b ..."]:
    """Dropout by one key an example: a share `rate` of the values is 0, the others grow for it."""
    kept = jax.vmap(partial(_kept, shape=x.shape[1:], rate=rate))(keys)
    return jnp.where(kept, x / (1 - rate), 0)


def _kept(key, shape, rate):
    # Half a random word a value: on a CPU most of a dropout's time is spent on drawing them.
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2),))
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]
    return (halves >= round(rate * 2**16)).reshape(shape)


def fold_keys(keys: Key[Array, " b"], number: int) -> Key[Array, " b"]:
    """Other keys, one an example, by a number."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


class Projections(nn.Module):
    """The queries, keys and values of an attention: one kernel, of which parts can be asked for."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], first: int = 0, last: int = 3
    ) -> tuple[Array, ...]:
        """Parts `first` to `last`, without it, of query, key, value; (B, L, D) each."""
        width = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, 3 * width))
        bias = self.param("bias", nn.initializers.zeros, (3 * width,))
        part = slice(first * width, last * width)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel[:, part], bias[part], dtype=self.dtype)
        return tuple(jnp.split(product(x, kernel) + bias, last - first, axis=-1))


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(d)) V; one product makes Q, K and V.

    Attributes:
      num_heads: divides the width.
      dropout: of the softmax's probabilities, where there are keys for it.
      dtype: of the computation; the softmax is float32 or wider.
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
          x: what is attended to.
          mask: (B, 1, queries, keys), true where a key is seen.
          queries: those rows of `x` whose answers are wanted; None: all.
          keys: of the dropout; None: without it.
          values_only: every token's own value in place of the mixture.
        """
        project = Projections(self.dtype, name="qkv")
        out = Dense(x.shape[-1], dtype=self.dtype, name="out")
        if values_only:
            return out(*project(x, 2, 3))
        if queries is None:
            query, key, value = project(x)
        else:
            (query,), (key, value) = project(queries, 0, 1), project(x, 1, 3)
        query, key, value = (self._by_head(part) for part in (query, key, value))
        scores = full_precision((query * query.shape[-1] ** -0.5) @ key.swapaxes(1, 2))
        if mask is not None:
            scores = scores + self._hidden(mask)
        # The sums divide what is mixed, which is less than the weights, and CPUs take the whole as
        # one kernel.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        if keys is not None and self.dropout:
            weights = self._drop(weights, keys)
        mixed = ((weights.astype(value.dtype) @ value) / total).astype(self.dtype)
        return out(self._side_by_side(mixed))

    def _by_head(self, x):
        """(B, L, D) to (B * heads, L, D / heads)."""
        b, length, width = x.shape
        x = x.reshape(b, length, self.num_heads, width // self.num_heads).transpose(0, 2, 1, 3)
        return x.reshape(-1, *x.shape[2:])

    def _side_by_side(self, x):
        """The inverse of `_by_head`."""
        _, length, width = x.shape
        x = x.reshape(-1, self.num_heads, length, width).transpose(0, 2, 1, 3)
        return x.reshape(*x.shape[:2], self.num_heads * width)

    def _hidden(self, mask):
        """What the scores are lowered by where a key is not seen; (1 or B * heads, #Q, L)."""
        mask = mask[:, 0]
        mask = mask if len(mask) == 1 else jnp.repeat(mask, self.num_heads, axis=0)
        return jnp.where(mask, 0.0, HIDDEN)

    def _drop(self, weights, keys):
        by_example = weights.reshape(-1, self.num_heads, *weights.shape[1:])
        return drop(by_example, keys, self.dropout).reshape(weights.shape)


class Block(nn.Module):
    """Attention and an MLP, both residual, with two LayerNorms.

    Attributes:
      num_heads: of the attention.
      mlp_width: hidden width of the MLP.
      activation: a name of `ACTIVATIONS`.
      epsilon: of the LayerNorms.
      post_norm: false: x + f(norm(x)), as in CLIP; true: norm(x + f(x)), as in BERT.
      dropout: of the attention's probabilities and of both residual branches, where there
        are keys for it.
      dtype: of the computation.
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
        """One block.

        Args:
          x: the states.
          mask: (B, 1, queries, keys), true where a key is seen.
          row: the one token of each example that is wanted, (B, 1, D); None: all (B, L, D).
          keys: of the dropout; None: without it.
          values_only: the attention's output projection of every token's own value, alone.
        """
        attention = Attention(self.num_heads, self.dropout, self.dtype, name="attention")
        mlp_in = Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")
        mlp_out = Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")
        norm_0 = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm_0")
        norm_1 = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm_1")
        activation = ACTIVATIONS[self.activation]
        attended = x if self.post_norm else norm_0(x)
        if values_only:
            return attention(attended, values_only=True)
        queries = None
        if row is not None:
            x, queries = (one[jnp.arange(len(x)), row][:, None] for one in (x, attended))
            mask = _row_of(mask, row)
        dropped = partial(_residual_dropout, keys=keys, rate=self.dropout)
        inside = None if keys is None else fold_keys(keys, 0)
        x = x + dropped(attention(attended, mask, queries, inside), site=1)
        x = norm_0(x) if self.post_norm else x
        hidden = mlp_in(x if self.post_norm else norm_1(x))
        x = x + dropped(mlp_out(activation(hidden)), site=2)
        return norm_1(x) if self.post_norm else x


def _row_of(mask, row):
    """The mask of one query an example, out of one of all queries or of none in particular."""
    if mask is None or mask.shape[2] == 1:
        return mask
    mask = jnp.broadcast_to(mask, (len(row), *mask.shape[1:]))
    return mask[jnp.arange(len(row)), :, row][:, :, None]


def _residual_dropout(x, *, keys, rate, site):
    return x if keys is None or not rate else drop(x, fold_keys(keys, site), rate)
