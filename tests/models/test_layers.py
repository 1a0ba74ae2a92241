"""Layers against the same operations of lax and linen."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from biclip_jax.models import layers

RNG = np.random.default_rng(0)


def noise(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def test_max_pool_and_gradient_match_linen():
    x = noise(2, 8, 6, 3)

    def linen_pool(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    np.testing.assert_array_equal(layers.max_pool_2x2(x), linen_pool(x))
    weight = noise(2, 4, 3, 3)
    found = jax.grad(lambda x: (layers.max_pool_2x2(x) * weight).sum())(x)
    expected = jax.grad(lambda x: (linen_pool(x) * weight).sum())(x)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_tied_maxima_share_the_gradient_like_a_reduction():
    x = jnp.asarray(RNG.integers(0, 2, (2, 8, 6, 3)), jnp.float32)
    weight = noise(2, 4, 3, 3)

    def reduced(x):
        return x.reshape(2, 4, 2, 3, 2, 3).max(axis=(2, 4))

    found = jax.grad(lambda x: (layers.max_pool_2x2(x) * weight).sum())(x)
    np.testing.assert_allclose(found, jax.grad(lambda x: (reduced(x) * weight).sum())(x))


def lax_convolution(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels", "features"),
    [
        (1, 16, 10, 3, 5),  # eight bands of rows
        (3, 6, 7, 4, 2),  # two bands
        (1, 7, 5, 6, 8),  # seven bands
        (1, 1, 3, 2, 2),  # a single row
        (5, 6, 6, 3, 4),  # lax's lowering
        (2, 4, 3, 16, 12),  # a matrix product
        (1, 2, 2, 7, 40),
    ],
)
def test_convolution_and_gradients_match_lax(batch, height, width, channels, features):
    x, kernel = noise(batch, height, width, channels), noise(3, 3, channels, features)
    weight = noise(batch, height, width, features)
    found, vjp_fn = jax.vjp(layers.convolve3x3, x, kernel)
    expected, lax_vjp_fn = jax.vjp(lax_convolution, x, kernel)
    np.testing.assert_array_equal(found, expected)
    for gradient, lax_gradient in zip(vjp_fn(weight), lax_vjp_fn(weight), strict=True):
        assert gradient.shape == lax_gradient.shape
        atol = 1e-5 * float(jnp.abs(lax_gradient).max())
        np.testing.assert_allclose(gradient, lax_gradient, atol=atol)


def test_convolution_uses_lax_on_accelerators():
    """On CPU, one small image takes a matrix product and bands of rows."""
    x, kernel = noise(1, 8, 8, 16), noise(3, 3, 16, 16)

    def gradients(convolve):
        return jax.jit(jax.grad(lambda x, kernel: convolve(x, kernel).sum(), (0, 1)))

    def operations(convolve, platform):
        lowered = gradients(convolve).trace(x, kernel).lower(lowering_platforms=(platform,))
        text = lowered.as_text()
        return [text.count(f"stablehlo.{name}") for name in ("convolution", "dot_general", "pad")]

    assert operations(layers.convolve3x3, "cuda") == operations(lax_convolution, "cuda")
    assert operations(layers.convolve3x3, "tpu") == operations(lax_convolution, "tpu")
    assert operations(layers.convolve3x3, "cpu") != operations(lax_convolution, "cpu")


def test_convolution_has_second_derivatives():
    x, kernel = noise(1, 4, 4, 2), noise(3, 3, 2, 3)

    def penalty(convolve):
        def slope(kernel):
            return jax.grad(lambda x: jnp.sin(convolve(x, kernel)).sum())(x)

        return jax.grad(lambda kernel: jnp.square(slope(kernel)).sum())(kernel)

    expected = penalty(lax_convolution)
    np.testing.assert_allclose(penalty(layers.convolve3x3), expected, rtol=1e-4, atol=1e-4)


def test_pointwise_convolution_matches_linen():
    x = noise(2, 3, 4, 5)
    layer, linen_layer = layers.conv1x1(2, jnp.float32), nn.Conv(2, (1, 1))
    variables = linen_layer.init(jax.random.key(0), x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables, layer.init(jax.random.key(0), x)))
    expected = linen_layer.apply(variables, x)
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "kernel", "padding"),
    [(layers.UpConv2x2(5), 2, 0), (layers.UpConv4x4(5), 4, 1)],
)
def test_transposed_convolutions_match_lax_with_a_dilated_input(module, kernel, padding):
    x, weight, bias = noise(2, 6, 7, 3), noise(kernel, kernel, 3, 5), noise(5)
    edge = kernel - 1 - padding
    expected = bias + jax.lax.conv_general_dilated(
        x,
        weight[::-1, ::-1],
        (1, 1),
        [(edge, edge)] * 2,
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    with jax.default_matmul_precision("highest"):
        found = module.apply({"params": {"kernel": weight, "bias": bias}}, x)
    assert found.shape == (2, 12, 14, 5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_batch_norm_normalises_and_tracks_the_unbiased_variance():
    x = noise(3, 4, 5, 2) * 4 + 7
    norm = layers.BatchNorm()
    variables = norm.init(jax.random.key(0), x, False)
    y, updates = norm.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-3)
    flat = np.asarray(x).reshape(-1, 2)
    stats = updates["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * flat.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-4)


def test_batch_norm_uses_running_statistics_at_inference():
    x = noise(1, 2, 2, 1)
    variables = {
        "params": {"scale": jnp.array([2.0]), "bias": jnp.array([1.0])},
        "batch_stats": {"mean": jnp.array([3.0]), "var": jnp.array([4.0])},
    }
    y = layers.BatchNorm(epsilon=0.0).apply(variables, x, False)
    np.testing.assert_allclose(y, (x - 3) / 2 * 2 + 1, rtol=1e-5)


def test_batch_norm_over_an_axis_uses_the_global_batch():
    x = noise(4, 2, 3, 2)
    norm = layers.BatchNorm(axis_name="batch")
    variables = layers.BatchNorm().init(jax.random.key(0), x, False)
    expected, global_updates = layers.BatchNorm().apply(variables, x, True, mutable=["batch_stats"])

    def apply_shard(x):
        return norm.apply(variables, x, True, mutable=["batch_stats"])

    shards, updates = jax.vmap(apply_shard, axis_name="batch")(x.reshape(2, 2, 2, 3, 2))
    np.testing.assert_allclose(shards.reshape(x.shape), expected, atol=1e-5)
    for name, value in global_updates["batch_stats"].items():
        np.testing.assert_allclose(updates["batch_stats"][name][0], value, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-5), ("bfloat16", 2**-8)])
def test_layer_norm_and_gradients_match_linen(dtype, rtol):
    x, weight = ((3 * noise(2, 5, 24) + 1).astype(dtype) for _ in range(2))
    linen_norm, norm = (cls(epsilon=1e-6, dtype=dtype) for cls in (nn.LayerNorm, layers.LayerNorm))
    variables = {"params": {"scale": 1 + noise(24), "bias": noise(24)}}
    assert jax.tree.structure(norm.init(jax.random.key(0), x)) == jax.tree.structure(variables)
    np.testing.assert_array_equal(norm.apply(variables, x), linen_norm.apply(variables, x))

    def gradients(layer, x):
        def loss(variables, x):
            return (layer.apply(variables, x).astype(jnp.float32) * weight).sum()

        return jax.tree.map(lambda g: np.asarray(g, float), jax.grad(loss, (0, 1))(variables, x))

    # In float32: linen's gradients in bfloat16 have rounded intermediates.
    expected = gradients(nn.LayerNorm(epsilon=1e-6), x.astype(jnp.float32))
    assert_close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-5)
    jax.tree.map(assert_close, gradients(norm, x), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_layer_norm_without_dtype_matches_linen(dtype):
    with jax.enable_x64(True):
        x = noise(3, 8).astype(dtype)
        linen_norm, norm = nn.LayerNorm(epsilon=1e-6), layers.LayerNorm(epsilon=1e-6)
        variables = linen_norm.init(jax.random.key(0), x)
        expected = linen_norm.apply(variables, x)
        found = norm.apply(variables, x)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("inner", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("outer", ["bfloat16", "float32", "float64"])
def test_gradients_have_the_dtype_of_their_variables(inner, outer):
    with jax.enable_x64(True):
        x, vector = noise(2, 4, 4, 8).astype(inner), noise(8).astype(outer)
        taps = noise(3, 3, 8).astype(outer)

        def norm(x, scale, bias):
            return layers.layer_norm(x, scale, bias, 1e-5).sum()

        def convolution(x, kernel):
            return layers.depthwise_conv3x3(x, kernel).sum()

        found = jax.grad(norm, (0, 1, 2))(x, vector, vector)
        found += jax.grad(convolution, (0, 1))(x, taps)
    assert [g.dtype for g in found] == [inner, outer, outer, inner, outer]


def test_layer_norm_uses_matrix_products_only_on_cpu():
    def gradient(x):
        return jax.grad(lambda x: layers.layer_norm(x, jnp.ones(8), jnp.zeros(8), 1e-5).sum())(x)

    traced = jax.jit(gradient).trace(noise(3, 8))
    counts = [
        traced.lower(lowering_platforms=(platform,)).as_text().count("dot_general")
        for platform in ("cpu", "cuda")
    ]
    assert counts == [2, 0]


def test_depthwise_convolution_and_gradients_match_lax():
    x, kernel, weight = noise(2, 5, 7, 3), noise(3, 3, 3), noise(2, 5, 7, 3)

    def lax_depthwise(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel[:, :, None],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )

    results = [
        (fn(x, kernel), *jax.grad(lambda *a, fn=fn: (fn(*a) * weight).sum(), (0, 1))(x, kernel))
        for fn in (layers.depthwise_conv3x3, lax_depthwise)
    ]
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gelu_is_exact_up_to_the_precision_of_the_dtype():
    x = np.linspace(-6, 6, 241)
    exact = x * ndtr(x)
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x, jnp.float32)), exact, atol=5e-7)
    narrow = jnp.asarray(x, jnp.bfloat16)
    assert layers.gelu(narrow).dtype == jnp.bfloat16
    wide = np.asarray(narrow, float)
    np.testing.assert_allclose(
        np.asarray(layers.gelu(narrow), float), wide * ndtr(wide), rtol=2**-8, atol=5e-7
    )


def test_depth_to_space_orders_rows_then_columns():
    x = jnp.arange(8.0).reshape(1, 1, 1, 8)
    expected = jnp.array([[[0.0, 1], [2, 3]], [[4, 5], [6, 7]]])[None]
    np.testing.assert_array_equal(layers.depth_to_space(x), expected)


def test_full_precision_only_widens():
    assert layers.full_precision(jnp.ones(1, jnp.bfloat16)).dtype == jnp.float32
    assert layers.full_precision(jnp.ones(1, jnp.float32)).dtype == jnp.float32


def test_bfloat16_products_and_gradients_accumulate_in_float32():
    x, kernel, weight = (noise(*shape) for shape in ((3, 5, 256), (256, 40), (3, 5, 40)))
    narrow = [array.astype(jnp.bfloat16) for array in (x, kernel, weight)]
    wide = [np.asarray(array, np.float64) for array in narrow]
    output, vjp_fn = jax.vjp(layers.product, *narrow[:2])
    rows, cotangent = wide[0].reshape(15, 256), wide[2].reshape(15, 40)
    expected = (wide[0] @ wide[1], wide[2] @ wide[1].T, rows.T @ cotangent)
    for found, exact in zip((output, *vjp_fn(narrow[2])), expected, strict=True):
        assert found.dtype == jnp.bfloat16 and found.shape == exact.shape
        # One rounding, at the end: half a unit in the last of 8 bits.
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-5)


def test_bfloat16_linear_layers_request_float32_accumulation():
    layer = layers.dense(4, jnp.bfloat16)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))

    def loss(variables, x):
        return jnp.square(layer.apply(variables, x)).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(variables, jnp.ones((2, 3)))
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(products) == 3
    for line in products:
        inputs, result = line.rsplit(" : ", 1)[1].split("->")
        assert inputs.count("bf16") == 2 and "xf32>" in result


def test_float32_linear_layers_and_their_jvp_match_linen():
    x = noise(2, 5, 3)
    dense, linen_dense = layers.Dense(4), nn.Dense(4)
    variables = linen_dense.init(jax.random.key(0), x)
    np.testing.assert_array_equal(dense.apply(variables, x), linen_dense.apply(variables, x))
    tangents = [
        jax.jvp(lambda x, layer=layer: layer.apply(variables, x), (x,), (x,))[1]
        for layer in (dense, linen_dense)
    ]
    np.testing.assert_array_equal(*tangents)
