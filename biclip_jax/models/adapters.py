"""MedCLIPSeg's PVL adapters (arXiv 2602.20423): probabilistic cross-attention of two streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from biclip_jax.models.layers import Dense, LayerNorm, fan_in_uniform, full_precision

# Full width at half maximum of a Gaussian, in standard deviations, as the authors round it.
BETA = 2.35
LEAST_VARIANCE = 1e-6


class Attended(NamedTuple):
    """A probabilistic attention up to its noise.

    Attributes:
      query: (B, Q, C) the stream that asks.
      weights: (B, Q, K) the softmax.
      value_mean, value_std: (B, K, C).
    """

    query: Float[Array, "b q c"]
    weights: Float[Array, "b q k"]
    value_mean: Float[Array, "b k c"]
    value_std: Float[Array, "b k c"]


class ProbabilisticAttention(nn.Module):
    """Single-head cross-attention with Gaussian keys and values, gated; section 3 of the paper.

    Attributes:
      width: C, of both streams.
      beta: how much a key's standard deviation lowers its score.
      gate_init: of the gate's logit.
      dtype: of the computation; the softmax is float32 or wider.
    """

    width: int
    beta: float = BETA
    gate_init: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        self.query = linear(self.width, self.width, self.dtype)
        self.key = linear(2 * self.width, self.width, self.dtype)
        self.value = linear(2 * self.width, self.width, self.dtype)
        self.out = linear(self.width, self.width, self.dtype)
        self.norm_key = LayerNorm(epsilon=1e-5, dtype=self.dtype)
        self.norm_value = LayerNorm(epsilon=1e-5, dtype=self.dtype)
        self.gate = self.param("gate", nn.initializers.constant(self.gate_init), ())

    def attend(self, x: Float[Array, "b q c"], context: Float[Array, "b k c"]) -> Attended:
        """Scores Q K^T / sqrt(C) - beta sqrt(Q^2 Var(K)^T / C), and the values' distribution."""
        query = full_precision(self.query(x))
        key_mean, key_variance = self._gaussian(self.key, self.norm_key, context)
        value_mean, value_variance = self._gaussian(self.value, self.norm_value, context)
        scores = query @ key_mean.swapaxes(1, 2) * self.width**-0.5
        variance = jnp.square(query) @ key_variance.swapaxes(1, 2) / self.width
        weights = jax.nn.softmax(scores - self.beta * jnp.sqrt(variance), axis=-1)
        return Attended(x, weights, value_mean, jnp.sqrt(value_variance))

    def mix(self, attended: Attended, noise: Float[Array, "b k c"] | None) -> Float[Array, "b q c"]:
        """The gated answer for values mean + std * noise; None: for their means."""
        value = attended.value_mean
        if noise is not None:
            value = value + attended.value_std * noise
        mixed = (attended.weights @ value).astype(self.dtype)
        gate = jax.nn.sigmoid(self.gate)
        return gate * self.out(mixed) + (1 - gate) * attended.query

    def __call__(self, x, context, noise=None) -> Float[Array, "b q c"]:
        """`attend`, then `mix`."""
        return self.mix(self.attend(x, context), noise)

    def _gaussian(self, project, norm, context):
        mean, raw = jnp.split(project(context), 2, axis=-1)
        variance = jax.nn.softplus(full_precision(raw)) + LEAST_VARIANCE
        return full_precision(norm(mean)), variance


class Prepared(NamedTuple):
    """An adapter up to its noise: both streams at its width, and the picture's first question."""

    image: Float[Array, "b n c"]
    text: Float[Array, "b l c"]
    attended: Attended


class Adapter(nn.Module):
    """PVL adapter: the picture asks the sentence, then the sentence asks the picture.

    Attributes:
      image_width, text_width: of the towers.
      width, beta, gate_init, dtype: see `ProbabilisticAttention`.
    """

    image_width: int
    text_width: int
    width: int = 256
    beta: float = BETA
    gate_init: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        self.image_down = linear(self.width, self.image_width, self.dtype, use_bias=False)
        self.text_down = linear(self.width, self.text_width, self.dtype, use_bias=False)
        fields = (self.width, self.beta, self.gate_init, self.dtype)
        self.image_from_text = ProbabilisticAttention(*fields)
        self.text_from_image = ProbabilisticAttention(*fields)
        self.image_up = linear(self.image_width, self.width, self.dtype, use_bias=False)
        self.text_up = linear(self.text_width, self.width, self.dtype, use_bias=False)

    def prepare(self, x: Float[Array, "b n d"], u: Float[Array, "b l e"]) -> Prepared:
        """What does not depend on this adapter's noise."""
        image, text = self.image_down(x), self.text_down(u)
        return Prepared(image, text, self.image_from_text.attend(image, text))

    def finish(
        self, prepared: Prepared, noise: Sequence[Array] | None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b l e"]]:
        """What is added to both streams.

        Args:
          prepared: see there.
          noise: of the sentence's values (B, L, C) and of the picture's (B, N, C).
        """
        of_text, of_image = (None, None) if noise is None else noise
        image = self.image_from_text.mix(prepared.attended, of_text)
        text = self.text_from_image(prepared.text, image, of_image)
        return self.image_up(image), self.text_up(text)

    def __call__(self, x, u, noise=None):
        """`prepare`, then `finish`."""
        return self.finish(self.prepare(x, u), noise)


def bounded_uniform(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the published framework's default."""

    def draw(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5

    return draw


def linear(
    features: int, inputs: int, dtype: Any, use_bias: bool = True, name: str | None = None
) -> nn.Dense:
    """A linear layer of `inputs` features with the published framework's first values."""
    return Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=fan_in_uniform,
        bias_init=bounded_uniform(inputs),
        name=name,
    )
