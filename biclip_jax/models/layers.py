"""Convolutions, up-sampling, pooling and norms shared by the networks.

All maps are (B, H, W, C). Some layers are written as matrix products and
reshapes where the stock lowering is slow on a CPU; the numbers are the same.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of the published network's framework.
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# For transposed 4x4 kernels of stride 2, where four of the 16 taps meet in an output: each layer
# with a ReLU behind it keeps the variance of what it sees.
contrast_uniform = nn.initializers.variance_scaling(8.0, "fan_in", "uniform")

LARGEST_PRODUCT = 2**23  # elements of a gradient's intermediate product on a CPU


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The exact form, x (1 + erf(x / sqrt(2))) / 2, as in the published network.

    linen's default is tanh, its exact form erfc, which takes a CPU longer. Narrow values are
    float32 inside, since 1 + erf of a negative one is a difference.
    """
    wide = full_precision(x)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def full_precision(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """float32 where `x` is narrower: statistics, losses and probabilities need it."""
    return x.astype(_wide(x))


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def product(x: Float[Array, "*b c"], kernel: Float[Array, "c d"]) -> Float[Array, "*b d"]:
    """x @ kernel; values narrower than float32 are summed in float32, forwards and backwards.

    GPUs and TPUs sum so by themselves. A CPU's units for bfloat16 are used for such sums alone;
    other products of bfloat16 are slower there than float32's. Of narrow values `jax.jvp` raises
    TypeError.
    """
    return x @ kernel if x.dtype == _wide(x) else _narrow_product(x, kernel)


@jax.custom_vjp
def _narrow_product(x, kernel):
    return _summed_wide(x, kernel, -1, 0)


def _narrow_backwards(residuals, given):
    x, kernel = residuals
    rows = x.reshape(-1, x.shape[-1])
    to_kernel = _summed_wide(rows, given.reshape(-1, given.shape[-1]), 0, 0)
    return _summed_wide(given, kernel, -1, 1), to_kernel


_narrow_product.defvjp(lambda *given: (_narrow_product(*given), given), _narrow_backwards)


def _summed_wide(a, b, axis_a, axis_b):
    """The product over one axis of each; the result is as narrow as they are."""
    over = (((axis_a % a.ndim,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, over, preferred_element_type=_wide(a)).astype(a.dtype)


def _product_as_linen_calls(x, kernel, dimension_numbers, **_: Any):
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    return product(x, kernel)


# linen's own but for the sums of narrow values, see `product`.
Dense = functools.partial(nn.Dense, dot_general=_product_as_linen_calls)


def dense(features: int, dtype: Any, name: str | None = None, zero_init: bool = False) -> nn.Dense:
    """A linear layer that begins as the published network's do, or at zero."""
    kernel_init = nn.initializers.zeros if zero_init else fan_in_uniform
    return Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


def _lax_conv3x3(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def convolve3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]
) -> Float[Array, "b h w d"]:
    """A 3x3 convolution of stride 1 that keeps the size of the map.

    Forwards it is lax's everywhere. Backwards a CPU takes the lowering that is fastest for the
    shape (benchmarks/convolutions.py), other backends lax's. Having its own reverse rule it has
    no forward-mode derivative: `jax.jvp` raises TypeError.
    """
    return _lax_conv3x3(x, kernel)


def _convolve_forwards(x, kernel):
    return _lax_conv3x3(x, kernel), (x, kernel)


def _convolve_backwards(residuals, given):
    x, kernel = residuals
    return (
        jax.lax.platform_dependent(kernel, given, cpu=_cpu_map_gradient, default=_map_gradient),
        jax.lax.platform_dependent(x, given, cpu=_cpu_kernel_gradient, default=_kernel_gradient),
    )


convolve3x3.defvjp(_convolve_forwards, _convolve_backwards)


def _map_gradient(kernel, given):
    x = jax.ShapeDtypeStruct((*given.shape[:3], kernel.shape[2]), given.dtype)
    (gradient,) = jax.linear_transpose(lambda x: _lax_conv3x3(x, kernel), x)(given)
    return gradient


def _kernel_gradient(x, given):
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], given.shape[-1]), given.dtype)
    (gradient,) = jax.linear_transpose(lambda kernel: _lax_conv3x3(x, kernel), kernel)(given)
    return gradient


def _cpu_map_gradient(kernel, given):
    """One matrix product with the kernel as it lies, then nine shifted sums, for small maps.

    lax's way turns the kernel over first, which for few pixels takes longer than the product.
    """
    b, h, w, d = given.shape
    c, pixels = kernel.shape[2], b * h * w
    if pixels > 4 * min(c, d) or pixels * 9 * c > LARGEST_PRODUCT:
        return _map_gradient(kernel, given)
    taps = given.reshape(pixels, d) @ kernel.reshape(9 * c, d).T
    taps = jnp.pad(taps.reshape(b, h, w, 3, 3, c), ((0, 0), (1, 1), (1, 1), *[(0, 0)] * 3))
    # dx[i] = sum over a of given[i + 1 - a] kernel[a]
    shifted = [taps[:, 2 - i :, 2 - j :, i, j][:, :h, :w] for i in range(3) for j in range(3)]
    return sum(shifted[1:], shifted[0])


def _cpu_kernel_gradient(x, given):
    """For fewer than four pictures: bands of rows stand for pictures.

    The pictures are the channels of the convolution that makes this gradient; with one of them
    the vectors of the processor are almost empty.
    """
    b, h, _, _ = x.shape
    bands = max(n for n in range(1, 8 // min(b, 8) + 1) if h % n == 0)
    if b >= 4 or bands == 1:
        return _kernel_gradient(x, given)
    rows = h // bands
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    starts = range(0, h, rows)
    return jax.lax.conv_general_dilated(
        jnp.concatenate([padded[:, i : i + rows + 2] for i in starts]),
        jnp.concatenate([given[:, i : i + rows] for i in starts]),
        (1, 1),
        "VALID",
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )


def _as_linen_calls(x, kernel, strides, padding, **_: Any):
    assert strides == (1, 1) and padding == [(1, 1), (1, 1)]
    return convolve3x3(x, kernel)


def conv1x1(features: int, dtype: Any, name: str | None = None) -> nn.Conv:
    """A 1x1 convolution as the matrix product that it is: backwards faster on a CPU."""
    return nn.Conv(
        features,
        (1, 1),
        dtype=dtype,
        conv_general_dilated=lambda x, kernel, *_, **__: product(x, kernel[0, 0]),
        name=name,
    )


def conv3x3(features: int, dtype: Any, use_bias: bool = True, name: str | None = None) -> nn.Conv:
    """A 3x3 convolution that keeps the size of the map, see `convolve3x3`."""
    return nn.Conv(
        features,
        (3, 3),
        padding=1,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=fan_in_uniform,
        conv_general_dilated=_as_linen_calls,
        name=name,
    )


@jax.custom_vjp
def max_pool_2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """Maximum over 2x2 blocks; H and W must be even. Equal maxima share the gradient evenly.

    Written out in slices, forwards and backwards: several times faster on a CPU than a
    windowed reduction or the derivative of one. `jax.jvp` raises TypeError.
    """
    return _maximum(_quarters(x))


def _quarters(x):
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c)
    return [blocks[:, :, i, :, j] for i in range(2) for j in range(2)]


def _maximum(maps):
    return functools.reduce(jnp.maximum, maps)


def _pool_backwards(x, given):
    quarters = _quarters(x)
    top = _maximum(quarters)
    share = given / sum((quarter == top).astype(given.dtype) for quarter in quarters)
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c)
    top, share = top[:, :, None, :, None], share[:, :, None, :, None]
    return (jnp.where(blocks == top, share, 0).reshape(x.shape),)


max_pool_2x2.defvjp(lambda x: (_maximum(_quarters(x)), x), _pool_backwards)


@jax.custom_vjp
def depthwise_conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c"]
) -> Float[Array, "b h w c"]:
    """A 3x3 convolution of every channel by itself, the map's size kept.

    A sum of shifted maps: on a CPU an order of magnitude faster than a grouped convolution.
    `jax.jvp` raises TypeError.
    """
    taps = kernel.reshape(9, -1)
    shifted = [part * tap for part, tap in zip(_shifts(x), taps, strict=True)]
    return sum(shifted[1:], shifted[0])


def _shifts(x):
    """The nine maps that a 3x3 kernel's taps see, rows first."""
    _, h, w, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [padded[:, a : a + h, b : b + w] for a in range(3) for b in range(3)]


def _depthwise_backwards(residuals, given):
    x, kernel = residuals
    to_taps = jnp.stack([(part * given).sum((0, 1, 2)) for part in _shifts(x)])
    to_x = depthwise_conv3x3(given, kernel[::-1, ::-1])
    return to_x.astype(x.dtype), to_taps.reshape(kernel.shape).astype(kernel.dtype)


depthwise_conv3x3.defvjp(
    lambda x, kernel: (depthwise_conv3x3(x, kernel), (x, kernel)), _depthwise_backwards
)


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
        return depth_to_space(product(x, kernel)) + bias


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
    kernel_init: nn.initializers.Initializer = fan_in_uniform
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w d"]:
        kernel = self.param("kernel", self.kernel_init, (4, 4, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return depth_to_space(convolve3x3(x, subpixel_kernel(kernel))) + bias


class LayerNorm(nn.Module):
    """linen's LayerNorm over the last axis, with the derivative of `layer_norm`.

    Attributes:
      epsilon: added to the variance.
      dtype: of the result; None: that of the statistics, which are float32 or wider.
    """

    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        normal = layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), self.epsilon)
        return normal if self.dtype is None else normal.astype(self.dtype)


def layer_norm(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], bias: Float[Array, " d"], epsilon: float
) -> Float[Array, "*b d"]:
    """(x - mean) / sqrt(variance + epsilon) scale + bias over the last axis, float32 or wider.

    Forwards it is linen's. Backwards it is written out, since the sums of products in XLA's
    derivative are slow on a CPU. `jax.jvp` raises TypeError.
    """
    dtype = jnp.result_type(x, scale, bias, jnp.float32)
    # Here, so that the parameters' gradients are as narrow or wide as they are.
    return _layer_norm(x, scale.astype(dtype), bias.astype(dtype), epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x, scale, bias, epsilon):
    return _layer_norm_forwards(x, scale, bias, epsilon)[0]


def _layer_norm_forwards(x, scale, bias, epsilon):
    wide = x.astype(scale.dtype)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
    factor = jax.lax.rsqrt(variance + epsilon)
    return (wide - mean) * (factor * scale) + bias, (x, mean, factor, scale)


def _layer_norm_backwards(_, residuals, given):
    x, mean, factor, scale = residuals
    normal = (x.astype(scale.dtype) - mean) * factor
    by_normal = given * normal
    level, slope = (_weighted_mean(part, scale) for part in (given, by_normal))
    to_x = factor * (given * scale - level - normal * slope)
    rows = tuple(range(x.ndim - 1))
    return to_x.astype(x.dtype), by_normal.sum(rows), given.sum(rows)


_layer_norm.defvjp(_layer_norm_forwards, _layer_norm_backwards)


def _weighted_mean(x, weights):
    """The mean of x * weights over the last axis, which stays; on a CPU as a product."""
    total = jax.lax.platform_dependent(
        x,
        weights,
        cpu=lambda x, weights: jnp.matmul(x, weights, precision="highest"),
        default=lambda x, weights: (x * weights).sum(-1),
    )
    return total[..., None] / x.shape[-1]


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
