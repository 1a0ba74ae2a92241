"""Convolutions, up-sampling, pooling and norms shared by the networks.

All maps are (B, H, W, C). Some layers are written as matrix products and
reshapes where the stock lowering is slow on a CPU; the numbers are the same.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of the published network's framework.
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The exact (erf) form, as in the published network; linen's default is tanh."""
    return nn.gelu(x, approximate=False)


def full_precision(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """float32 where `x` is narrower: statistics, losses and probabilities need it."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def dense(features: int, dtype: Any, name: str | None = None) -> nn.Dense:
    """A linear layer with the initialisation of the published network."""
    return nn.Dense(features, dtype=dtype, kernel_init=fan_in_uniform, name=name)


def conv3x3(features: int, dtype: Any, use_bias: bool = True, name: str | None = None) -> nn.Conv:
    """A 3x3 convolution that keeps the size of the map."""
    return nn.Conv(
        features,
        (3, 3),
        padding=1,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=fan_in_uniform,
        name=name,
    )


def max_pool_2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """Maximum over 2x2 blocks; H and W must be even.

    A reshape and a maximum: several times faster on a CPU than a windowed
    reduction, above all backwards.
    """
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def depthwise_conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c"]
) -> Float[Array, "b h w c"]:
    """A 3x3 convolution of every channel by itself, the map's size kept.

    A sum of shifted maps: on a CPU an order of magnitude faster than a grouped convolution.
    """
    _, h, w, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, a : a + h, b : b + w] * kernel[a, b] for a in range(3) for b in range(3)]
    return sum(shifted[1:], shifted[0])


def depth_to_space(x: Float[Array, "b h w d"]) -> Float[Array, "b 2*h 2*w d//4"]:
    """Spreads channel groups ordered (row, column, channel) over 2x2 blocks."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, 2 * h, 2 * w, c // 4)


class UpConv2x2(nn.Module):
    """Transposed convolution with kernel 2, stride 2: y[2i+a, 2j+b] = x[i, j] W[a, b] + bias.

    The windows do not overlap, so it is one matrix product and a reshape.
    """

    features: int
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w d"]:
        kernel = self.param("kernel", fan_in_uniform, (2, 2, x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = kernel.transpose(2, 0, 1, 3).reshape(x.shape[-1], 4 * self.features)
        return depth_to_space(x @ kernel) + bias


def subpixel_kernel(kernel: Float[Array, "4 4 c d"]) -> Float[Array, "3 3 c 4*d"]:
    """A transposed 4x4 kernel of stride 2, padding 1 as an ordinary 3x3 one on four phases.

    From y[2i - 1 + a] += x[i] W[a]: the even outputs see x[m-1] W[3] + x[m] W[1],
    the odd ones x[m] W[2] + x[m+1] W[0].
    """
    zero = jnp.zeros_like(kernel[0])
    phases = [jnp.stack([kernel[3], kernel[1], zero]), jnp.stack([zero, kernel[2], kernel[0]])]
    columns = []
    for rows in phases:
        rows = rows.swapaxes(0, 1)
        zero = jnp.zeros_like(rows[0])
        even, odd = [rows[3], rows[1], zero], [zero, rows[2], rows[0]]
        columns += [jnp.stack(even, 1), jnp.stack(odd, 1)]
    return jnp.concatenate(columns, axis=-1)


class UpConv4x4(nn.Module):
    """Transposed convolution with kernel 4, stride 2, padding 1: doubles the map.

    y[2i - 1 + a, 2j - 1 + b] += x[i, j] W[a, b], as in the published generator;
    computed as a 3x3 convolution to four phases, without a dilated input.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w d"]:
        kernel = self.param("kernel", fan_in_uniform, (4, 4, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        phases = jax.lax.conv_general_dilated(
            x, subpixel_kernel(kernel), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return depth_to_space(phases) + bias


class BatchNorm(nn.Module):
    """Batch normalisation with the running variance UNBIASED, as the published network keeps it.

    Normalises with the biased variance of the batch in training and with the
    running statistics otherwise. With `axis_name` the statistics are those of
    the batch over all devices, so that N devices give the numbers of one.
    Statistics are float32 whatever `dtype` is.
    """

    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        mean, var = running_mean.value, running_var.value
        if train:
            mean, var, count = self._batch_statistics(x)
            if not self.is_initializing():
                keep, unbiased = self.momentum, var * (count / (count - 1))
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * unbiased
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        return (x * factor + (bias - mean * factor)).astype(self.dtype)

    def _batch_statistics(self, x):
        x = full_precision(x)
        moments = jnp.stack([x.mean((0, 1, 2)), jnp.square(x).mean((0, 1, 2))])
        count = x.size // x.shape[-1]
        if self.axis_name is not None and not self.is_initializing():
            moments = jax.lax.pmean(moments, self.axis_name)
            count *= jax.lax.axis_size(self.axis_name)
        mean, mean_of_squares = moments
        return mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0.0), count
