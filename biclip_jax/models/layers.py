"""Convolutions, up-sampling, pooling and norms shared by the networks.

Feature maps are (B, H, W, C). Some layers are matrix products and reshapes because XLA's stock
lowering is slow on CPU; the results are the same.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of the published network's framework.
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# For transposed 4x4 kernels of stride 2, where each output receives four of the 16 taps: the layer
# and the ReLU after it preserve the variance of their input.
contrast_uniform = nn.initializers.variance_scaling(8.0, "fan_in", "uniform")

LARGEST_PRODUCT = 2**23  # elements of the intermediate product of a gradient on CPU


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Computes the exact GELU, x (1 + erf(x / sqrt(2))) / 2, as in the published network.

    The default of linen is the tanh approximation, and its exact form uses erfc, which is slower
    on CPU. Inputs narrower than float32 are computed in float32 because 1 + erf(x) cancels for
    negative x.
    """
    wide = full_precision(x)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def full_precision(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Casts `x` to float32 if it is narrower, as statistics, losses and probabilities require."""
    return x.astype(_accumulation_dtype(x))


def _accumulation_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def product(x: Float[Array, "*b c"], kernel: Float[Array, "c d"]) -> Float[Array, "*b d"]:
    """Computes x @ kernel; inputs narrower than float32 accumulate in float32 in both passes.

    GPUs and TPUs accumulate this way by default. On CPU only such products use the bfloat16 units;
    other bfloat16 products are slower than float32 ones. `jax.jvp` raises TypeError for narrow
    inputs.
    """
    return x @ kernel if x.dtype == _accumulation_dtype(x) else _narrow_product(x, kernel)


@jax.custom_vjp
def _narrow_product(x, kernel):
    return _contract_in_float32(x, kernel, -1, 0)


def _narrow_product_bwd(residuals, cotangent):
    x, kernel = residuals
    rows = x.reshape(-1, x.shape[-1])
    grad_kernel = _contract_in_float32(rows, cotangent.reshape(-1, cotangent.shape[-1]), 0, 0)
    return _contract_in_float32(cotangent, kernel, -1, 1), grad_kernel


_narrow_product.defvjp(lambda *args: (_narrow_product(*args), args), _narrow_product_bwd)


def _contract_in_float32(a, b, axis_a, axis_b):
    """Contracts one axis of each input; accumulates in float32, returns the input dtype."""
    axes = (((axis_a % a.ndim,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=_accumulation_dtype(a)).astype(
        a.dtype
    )


def _linen_dot_general(x, kernel, dimension_numbers, **_: Any):
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    return product(x, kernel)


# nn.Dense with the accumulation of `product`.
Dense = functools.partial(nn.Dense, dot_general=_linen_dot_general)


def dense(features: int, dtype: Any, name: str | None = None, zero_init: bool = False) -> nn.Dense:
    """Returns a linear layer initialised as in the published network, or to zero."""
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
    """Applies a 3x3 convolution of stride 1 with SAME padding.

    The forward pass is lax's on every backend. On CPU the backward pass selects the lowering that
    is fastest for the shape (benchmarks/convolutions.py); other backends use lax's. The custom VJP
    rules out forward-mode derivatives: `jax.jvp` raises TypeError.
    """
    return _lax_conv3x3(x, kernel)


def _convolve_fwd(x, kernel):
    return _lax_conv3x3(x, kernel), (x, kernel)


def _convolve_bwd(residuals, cotangent):
    x, kernel = residuals
    return (
        jax.lax.platform_dependent(
            kernel, cotangent, cpu=_cpu_input_gradient, default=_input_gradient
        ),
        jax.lax.platform_dependent(
            x, cotangent, cpu=_cpu_kernel_gradient, default=_kernel_gradient
        ),
    )


convolve3x3.defvjp(_convolve_fwd, _convolve_bwd)


def _input_gradient(kernel, cotangent):
    x = jax.ShapeDtypeStruct((*cotangent.shape[:3], kernel.shape[2]), cotangent.dtype)
    (gradient,) = jax.linear_transpose(lambda x: _lax_conv3x3(x, kernel), x)(cotangent)
    return gradient


def _kernel_gradient(x, cotangent):
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], cotangent.shape[-1]), cotangent.dtype)
    (gradient,) = jax.linear_transpose(lambda kernel: _lax_conv3x3(x, kernel), kernel)(cotangent)
    return gradient


def _cpu_input_gradient(kernel, cotangent):
    """Computes one matrix product and nine shifted sums, for small maps.

    lax transposes the kernel first, which takes longer than the product if there are few pixels.
    """
    b, h, w, d = cotangent.shape
    c, pixels = kernel.shape[2], b * h * w
    if pixels > 4 * min(c, d) or pixels * 9 * c > LARGEST_PRODUCT:
        return _input_gradient(kernel, cotangent)
    taps = cotangent.reshape(pixels, d) @ kernel.reshape(9 * c, d).T
    taps = jnp.pad(taps.reshape(b, h, w, 3, 3, c), ((0, 0), (1, 1), (1, 1), *[(0, 0)] * 3))
    # dx[i] = sum over a of cotangent[i + 1 - a] kernel[a]
    shifted = [taps[:, 2 - i :, 2 - j :, i, j][:, :h, :w] for i in range(3) for j in range(3)]
    return sum(shifted[1:], shifted[0])


def _cpu_kernel_gradient(x, cotangent):
    """Splits a batch of fewer than four images into bands of rows, which act as images.

    The batch is the channel axis of the convolution that computes this gradient; a single image
    would leave the processor's vector registers almost empty.
    """
    b, h, _, _ = x.shape
    bands = max(n for n in range(1, 8 // min(b, 8) + 1) if h % n == 0)
    if b >= 4 or bands == 1:
        return _kernel_gradient(x, cotangent)
    rows = h // bands
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    starts = range(0, h, rows)
    return jax.lax.conv_general_dilated(
        jnp.concatenate([padded[:, i : i + rows + 2] for i in starts]),
        jnp.concatenate([cotangent[:, i : i + rows] for i in starts]),
        (1, 1),
        "VALID",
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )


def _linen_conv_general_dilated(x, kernel, strides, padding, **_: Any):
    assert strides == (1, 1) and padding == [(1, 1), (1, 1)]
    return convolve3x3(x, kernel)


def conv1x1(features: int, dtype: Any, name: str | None = None) -> nn.Conv:
    """Returns a 1x1 convolution computed as a matrix product; faster backward pass on CPU."""
    return nn.Conv(
        features,
        (1, 1),
        dtype=dtype,
        conv_general_dilated=lambda x, kernel, *_, **__: product(x, kernel[0, 0]),
        name=name,
    )


def conv3x3(features: int, dtype: Any, use_bias: bool = True, name: str | None = None) -> nn.Conv:
    """Returns a 3x3 convolution that preserves the spatial size; see `convolve3x3`."""
    return nn.Conv(
        features,
        (3, 3),
        padding=1,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=fan_in_uniform,
        conv_general_dilated=_linen_conv_general_dilated,
        name=name,
    )


@jax.custom_vjp
def max_pool_2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """Computes the maximum over 2x2 blocks; H and W must be even. Ties share the gradient equally.

    Written with slices in both directions: several times faster on CPU than a windowed reduction
    or its derivative. `jax.jvp` raises TypeError.
    """
    return _maximum(_quarters(x))


def _quarters(x):
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c)
    return [blocks[:, :, i, :, j] for i in range(2) for j in range(2)]


def _maximum(maps):
    return functools.reduce(jnp.maximum, maps)


def _max_pool_bwd(x, cotangent):
    quarters = _quarters(x)
    top = _maximum(quarters)
    share = cotangent / sum((quarter == top).astype(cotangent.dtype) for quarter in quarters)
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c)
    top, share = top[:, :, None, :, None], share[:, :, None, :, None]
    return (jnp.where(blocks == top, share, 0).reshape(x.shape),)


max_pool_2x2.defvjp(lambda x: (_maximum(_quarters(x)), x), _max_pool_bwd)


@jax.custom_vjp
def depthwise_conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c"]
) -> Float[Array, "b h w c"]:
    """Applies a depthwise 3x3 convolution with SAME padding.

    Written as a sum of shifted maps, an order of magnitude faster on CPU than a grouped
    convolution. `jax.jvp` raises TypeError.
    """
    taps = kernel.reshape(9, -1)
    shifted = [part * tap for part, tap in zip(_shifts(x), taps, strict=True)]
    return sum(shifted[1:], shifted[0])


def _shifts(x):
    """Returns the nine shifted maps that correspond to the taps of a 3x3 kernel, row by row."""
    _, h, w, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [padded[:, a : a + h, b : b + w] for a in range(3) for b in range(3)]


def _depthwise_bwd(residuals, cotangent):
    x, kernel = residuals
    grad_taps = jnp.stack([(part * cotangent).sum((0, 1, 2)) for part in _shifts(x)])
    grad_x = depthwise_conv3x3(cotangent, kernel[::-1, ::-1])
    return grad_x.astype(x.dtype), grad_taps.reshape(kernel.shape).astype(kernel.dtype)


depthwise_conv3x3.defvjp(
    lambda x, kernel: (depthwise_conv3x3(x, kernel), (x, kernel)), _depthwise_bwd
)


def depth_to_space(x: Float[Array, "b h w d"]) -> Float[Array, "b 2*h 2*w d//4"]:
    """Rearranges channel groups ordered (row, column, channel) into 2x2 blocks."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, 2 * h, 2 * w, c // 4)


class UpConv2x2(nn.Module):
    """Transposed convolution with kernel 2 and stride 2: y[2i+a, 2j+b] = x[i, j] W[a, b] + bias.

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
    """Converts a transposed 4x4 kernel (stride 2, padding 1) to a 3x3 kernel with four phases.

    From y[2i - 1 + a] += x[i] W[a]: even outputs are x[m-1] W[3] + x[m] W[1], odd outputs are x[m]
    W[2] + x[m+1] W[0].
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
    """Transposed convolution with kernel 4, stride 2 and padding 1; doubles the spatial size.

    y[2i - 1 + a, 2j - 1 + b] += x[i, j] W[a, b], as in the published generator. Computed as a 3x3
    convolution with four output phases, without dilating the input.
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
    """Layer normalisation over the last axis, as in linen, with the custom VJP of `layer_norm`.

    Attributes:
      epsilon: Added to the variance.
      dtype: Dtype of the result; None keeps that of the statistics, float32 or wider.
    """

    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), self.epsilon)
        return y if self.dtype is None else y.astype(self.dtype)


def layer_norm(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], bias: Float[Array, " d"], epsilon: float
) -> Float[Array, "*b d"]:
    """Computes (x - mean) / sqrt(variance + epsilon) scale + bias over the last axis.

    The computation and the result are float32 or wider. The forward pass is linen's. The backward
    pass is written out because the sums of products in XLA's derivative are slow on CPU. `jax.jvp`
    raises TypeError.
    """
    dtype = jnp.result_type(x, scale, bias, jnp.float32)
    # Cast outside the custom VJP, so that the gradients have the dtype of the parameters.
    return _layer_norm(x, scale.astype(dtype), bias.astype(dtype), epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x, scale, bias, epsilon):
    return _layer_norm_fwd(x, scale, bias, epsilon)[0]


def _layer_norm_fwd(x, scale, bias, epsilon):
    wide = x.astype(scale.dtype)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
    factor = jax.lax.rsqrt(variance + epsilon)
    return (wide - mean) * (factor * scale) + bias, (x, mean, factor, scale)


def _layer_norm_bwd(_, residuals, cotangent):
    x, mean, factor, scale = residuals
    normalized = (x.astype(scale.dtype) - mean) * factor
    weighted = cotangent * normalized
    offset, slope = (_weighted_mean(part, scale) for part in (cotangent, weighted))
    grad_x = factor * (cotangent * scale - offset - normalized * slope)
    axes = tuple(range(x.ndim - 1))
    return grad_x.astype(x.dtype), weighted.sum(axes), cotangent.sum(axes)


_layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def _weighted_mean(x, weights):
    """Computes the mean of x * weights over the last axis (kept); a matrix product on CPU."""
    total = jax.lax.platform_dependent(
        x,
        weights,
        cpu=lambda x, weights: jnp.matmul(x, weights, precision="highest"),
        default=lambda x, weights: (x * weights).sum(-1),
    )
    return total[..., None] / x.shape[-1]


class BatchNorm(nn.Module):
    """Batch normalisation whose running variance is UNBIASED, as in the published network.

    Training normalises with the biased variance of the batch, inference with the running
    statistics. With `axis_name` the batch statistics are computed over all devices, so that N
    devices give the same numbers as one. Statistics are float32 for every `dtype`.
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
