"""MedCLIPSeg's PVL adapters (arXiv 2602.20423): probabilistic cross-attention of two streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from biclip_jax.models.layers import Dense, LayerNorm, fan_in_uniform, full_precision

# Full width at half maximum of a Gaussian, in standard deviations, rounded as by the authors.
BETA = 2.35
MIN_VARIANCE = 1e-6


class Attended(NamedTuple):
    """State of a probabilistic attention before its noise is drawn.

    Attributes:
      query: (B, Q, C) query stream.
      weights: (B, Q, K) attention weights (softmax).
      value_mean, value_std: (B, K, C) Gaussian of the values.
    """

    query: Float[Array, "b q c"]
    weights: Float[Array, "b q k"]
    value_mean: Float[Array, "b k c"]
    value_std: Float[Array, "b k c"]


class ProbabilisticAttention(nn.Module):
    """Gated single-head cross-attention with Gaussian keys and values; section 3 of the paper.

    Attributes:
      width: C, width of both streams.
      beta: Weight by which a key's standard deviation lowers its score.
      gate_init: Initial logit of the gate.
      dtype: Dtype of the computation; the softmax uses float32 or wider.
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
        """Computes the attention weights and the distribution of the values.

        The scores are Q K^T / sqrt(C) - beta sqrt(Q^2 Var(K)^T / C).
        """
        query = full_precision(self.query(x))
        key_mean, key_variance = self._gaussian(self.key, self.norm_key, context)
        value_mean, value_variance = self._gaussian(self.value, self.norm_value, context)
        scores = query @ key_mean.swapaxes(1, 2) * self.width**-0.5
        variance = jnp.square(query) @ key_variance.swapaxes(1, 2) / self.width
        weights = jax.nn.softmax(scores - self.beta * jnp.sqrt(variance), axis=-1)
        return Attended(x, weights, value_mean, jnp.sqrt(value_variance))

    def mix(self, attended: Attended, noise: Float[Array, "b k c"] | None) -> Float[Array, "b q c"]:
        """Returns the gated output for values mean + std * noise; None uses the means."""
        value = attended.value_mean
        if noise is not None:
            value = value + attended.value_std * noise
        mixed = (attended.weights @ value).astype(self.dtype)
        gate = jax.nn.sigmoid(self.gate)
        return gate * self.out(mixed) + (1 - gate) * attended.query

    def __call__(self, x, context, noise=None) -> Float[Array, "b q c"]:
        """Runs `attend`, then `mix`."""
        return self.mix(self.attend(x, context), noise)

    def _gaussian(self, project, norm, context):
        mean, raw = jnp.split(project(context), 2, axis=-1)
        variance = jax.nn.softplus(full_precision(raw)) + MIN_VARIANCE
        return full_precision(norm(mean)), variance


class Prepared(NamedTuple):
    """State of an adapter before its noise is drawn.

    Attributes:
      image: (B, N, C) image stream at the adapter's width.
      text: (B, L, C) text stream at the adapter's width.
      attended: Attention of the image to the text.
    """

    image: Float[Array, "b n c"]
    text: Float[Array, "b l c"]
    attended: Attended


class Adapter(nn.Module):
    """PVL adapter: the image attends to the text, then the text attends to the image.

    Attributes:
      image_width, text_width: Widths of the encoders.
      width, beta, gate_init, dtype: See `ProbabilisticAttention`.
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
        """Computes the part that does not depend on the noise of this adapter."""
        image, text = self.image_down(x), self.text_down(u)
        return Prepared(image, text, self.image_from_text.attend(image, text))

    def finish(
        self, prepared: Prepared, noise: Sequence[Array] | None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b l e"]]:
        """Computes the updates to be added to both streams.

        Args:
          prepared: Output of `prepare`.
          noise: Noise of the text values (B, L, C) and of the image values (B, N, C).
        """
        text_noise, image_noise = (None, None) if noise is None else noise
        image = self.image_from_text.mix(prepared.attended, text_noise)
        text = self.text_from_image(prepared.text, image, image_noise)
        return self.image_up(image), self.text_up(text)

    def __call__(self, x, u, noise=None):
        """Runs `prepare`, then `finish`."""
        return self.finish(self.prepare(x, u), noise)


def bounded_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Returns the initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the published default."""

    def draw(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5

    return draw


def linear(
    features: int, inputs: int, dtype: Any, use_bias: bool = True, name: str | None = None
) -> nn.Dense:
    """Returns a linear layer with `inputs` input features and the published initialisation."""
    return Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=fan_in_uniform,
        bias_init=bounded_uniform(inputs),
        name=name,
    )
