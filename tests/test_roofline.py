"""The FLOP counter against products and convolutions by hand; times against formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks import roofline
from biclip_jax.core import config as config_lib
from biclip_jax.models.unet import UNet
from reference.flops import count

NHWC = ("NHWC", "HWIO", "NHWC")
STEP = {
    "flops_per_image": 3_000_000_000,
    "backward_flops_per_image": 2_000_000_000,
    "gradient_bytes": 8_000_000,
    "state_bytes": 32_000_000,
    "traffic_bytes_per_image": 10_000_000,
    "fixed_traffic_bytes": 64_000_000,
    "sync_forward": 6,
    "sync_backward": 4,
}
CHIP = roofline.Chip("chip", flops=1e12, bandwidth=1e11, memory=1e9)


def flops(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count(function, *arrays)


def convolve(x, kernel, stride=1, padding="VALID", **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=NHWC, **options
    )


def gradient(function, argument):
    return jax.grad(lambda *x: (function(*x) ** 2).sum(), argument)


def test_a_matmul_takes_two_flops_per_multiply_add():
    assert flops(jnp.matmul, (3, 4), (4, 5)) == 2 * 3 * 4 * 5
    assert flops(partial(jnp.einsum, "bij,bjk->bik"), (7, 3, 4), (7, 4, 5)) == 2 * 7 * 3 * 4 * 5
    # The gradient takes the product itself and one more of the same size.
    assert flops(gradient(jnp.matmul, 0), (3, 4), (4, 5)) == 2 * 2 * 3 * 4 * 5


@pytest.mark.parametrize(
    ("options", "size", "taps"),
    [
        ({}, 8, 6 * 3),
        ({"stride": 2}, 9, 4 * 3),
        ({"padding": "SAME"}, 8, 8 * 3 - 2),  # the first and last outputs miss one tap each
        ({"padding": ((2, 2), (2, 2))}, 8, 10 * 3 - 2 * (1 + 2)),
        ({"rhs_dilation": (2, 2)}, 8, 4 * 3),
        # Zeros between 4 inputs, 3 taps, 9 outputs: each input is multiplied by each tap once.
        ({"lhs_dilation": (2, 2), "padding": ((2, 2), (2, 2))}, 4, 4 * 3),
    ],
)
def test_a_convolution_does_not_count_padding(options, size, taps):
    shapes = (2, size, size, 5), (3, 3, 5, 7)
    assert flops(partial(convolve, **options), *shapes) == 2 * 2 * 5 * 7 * taps**2


def test_a_grouped_convolution_counts_only_its_group():
    grouped = partial(convolve, feature_group_count=2)
    assert flops(grouped, (1, 5, 5, 6), (3, 3, 3, 4)) == 2 * 4 * 3 * 9 * 9


@pytest.mark.parametrize("options", [{"padding": "SAME"}, {"stride": 2}])
@pytest.mark.parametrize("argument", [0, 1])
def test_each_gradient_of_a_convolution_takes_as_many_flops(options, argument):
    shapes = (2, 9, 9, 5), (3, 3, 5, 7)
    forward = flops(partial(convolve, **options), *shapes)
    assert flops(gradient(partial(convolve, **options), argument), *shapes) == 2 * forward


def test_a_transposed_convolution_counts_its_real_inputs():
    transposed = partial(jax.lax.conv_transpose, strides=(2, 2), padding="VALID")
    # Each input is multiplied by each tap of the kernel.
    assert flops(transposed, (1, 4, 4, 3), (2, 2, 3, 5)) == 2 * 3 * 5 * (4 * 2) ** 2


def test_counts_loops_and_branches():
    def looped(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=6)[0]

    def branched(x):
        return jax.lax.platform_dependent(
            x, cpu=lambda x: x @ x @ x, default=lambda x: jax.jit(jnp.matmul)(x, x)
        )

    assert flops(looped, (4, 4)) == 6 * 2 * 4**3
    assert flops(branched, (4, 4)) == 2 * 4**3
    assert flops(lambda x: jax.checkpoint(branched)(x) + jnp.exp(x), (4, 4)) == 2 * 4**3


def test_the_unet_matches_its_formula():
    """Per level: two 3x3 convolutions down, two up and a 2x2 up-convolution; then a 1x1 head."""
    widths, size = (4, 8, 16), 16
    model = UNet(widths)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    traced = jax.make_jaxpr(partial(model.apply, train=False))(variables, image)
    expected = 2 * size**2 * widths[0]
    channels = 3
    for level, width in enumerate(widths):
        side = size // 2**level
        taps = (3 * side - 2) ** 2  # zeros outside the map are not counted
        expected += 2 * taps * (channels * width + width * width)
        if level < len(widths) - 1:
            expected += 2 * taps * (2 * width * width + width * width)
            expected += 2 * (side // 2) ** 2 * 2 * width * 4 * width
        channels = width
    assert roofline.count(traced.jaxpr)["forward_flops"] == expected


def test_all_reduce_over_nested_rings():
    assert roofline.all_reduce_seconds(8e6, ()) == 0
    assert roofline.all_reduce_seconds(8e6, [(4, 1e9)]) == pytest.approx(2 * 3 / 4 * 8e-3)
    both = roofline.all_reduce_seconds(8e6, [(4, 1e9), (2, 1e8)])
    assert both == pytest.approx(2 * 3 / 4 * 8e-3 + 2 * 1 / 2 * 2e-2)


def test_roofline_of_one_chip():
    few, many = (roofline.on_one_chip(STEP, CHIP, batch) for batch in (1, 16))
    # 3 GFLOP at 1 TFLOP/s; 74 MB at 100 GB/s.
    assert (few["compute_ms"], few["memory_ms"], few["bound"]) == (3.0, 0.74, "compute")
    assert (few["intensity"], few["ridge"]) == (41, 10)
    assert few["step_ms"] == pytest.approx(3.0 / roofline.EFFICIENCY)
    assert many["images_per_second"] == round(1e3 / 3.0 * roofline.EFFICIENCY)
    assert many["state_share_of_memory"] == 0.032
    slow = roofline.on_one_chip(STEP, CHIP._replace(bandwidth=1e9), 1)
    assert (slow["bound"], slow["step_ms"]) == ("memory", 74.0)


def test_cost_of_communication():
    single = roofline.on_several(STEP, CHIP, 1, roofline.Network())
    assert single["all_reduce_ms"] == single["sync_ms"] == 0
    assert single["overlap_16"] == single["no_overlap_16"] == single["hiding_batch"] == 1
    network = roofline.Network(latency=1e-4, rings=[(4, 1e8)])
    several = roofline.on_several(STEP, CHIP, 4, network)
    assert (several["all_reduce_ms"], several["sync_ms"]) == (120.0, 1.0)
    # Backward: 2 GFLOP per image at 0.4 TFLOP/s is 5 ms; the step of 16 images takes 120 ms.
    assert several["hiding_batch"] == 24
    assert several["overlap_16"] == round(120 / (120 + 1 + 120 - 16 * 5), 4)
    assert several["no_overlap_16"] == round(120 / (120 + 1 + 120), 4)
    assert several["overlap_64"] == round(480 / 481, 4)


def test_counts_of_a_full_train_step(monkeypatch):
    traces, traced = [], roofline.traced

    def recorded(config, rows):
        traces.append(traced(config, rows))
        return traces[-1]

    monkeypatch.setattr(roofline, "traced", recorded)
    step = roofline.count_step(config_lib.load_config("default:smoke", []))
    assert step["gradient_bytes"] == 4 * step["parameters"]
    assert step["optimizer_bytes"] == pytest.approx(2 * step["gradient_bytes"], rel=1e-3)
    # Forward: two views of five blocks with two norms each; backward: one view.
    assert (step["sync_forward"], step["sync_backward"]) == (20, 10)
    assert step["sync_bytes"] == 3 * 2 * 2 * 4 * (2 * 4 + 2 * 8 + 16)
    # The weak view's backward pass is twice its forward pass; the strong view has none.
    forward = step["flops_per_image"] - step["backward_flops_per_image"]
    assert forward < step["backward_flops_per_image"] < 2 * forward
    assert len(roofline.entries(step)) == 1 + 3 * 2 + 3 * 4
    # After the loss only the gradients and a few sums are reduced, for any batch size.
    few, many = (roofline.count(jaxpr)["reduced_bytes"] for jaxpr, _ in traces)
    assert few == many
    assert 0 < few - step["gradient_bytes"] < 100
