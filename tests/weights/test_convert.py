"""Conversion of arrays: axes, dtypes, names, and errors for invalid files."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.weights import convert, keys
from biclip_jax.weights.formats.tensor import Tensor
from biclip_jax.weights.readers import Checkpoint

PATH = Path("source.bin")
TABLE = {
    **keys.expand([("linear", "qkv", ("q", "k")), ("norm", "norm", "ln")]),
    **keys.expand([("param", "scale", "scale"), ("conv_no_bias", "conv", "conv")]),
}
SHAPES = {
    "params/qkv/kernel": (3, 4),
    "params/qkv/bias": (4,),
    "params/norm/scale": (5,),
    "params/norm/bias": (5,),
    "params/scale": (),
    "params/conv/kernel": (3, 3, 2, 6),
}


def numbers(*shape, dtype="float32"):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


def tensor(array):
    return Tensor(array.shape, array.dtype, lambda: array)


def arrays():
    return {
        "q.weight": numbers(2, 3),
        "k.weight": numbers(2, 3) + 100,
        "q.bias": numbers(2),
        "k.bias": numbers(2) + 100,
        "ln.weight": numbers(5),
        "ln.bias": numbers(5) + 100,
        "scale": numbers() + 7,
        "conv.weight": numbers(6, 2, 3, 3),
    }


def load(sources, unused=(), shapes=SHAPES):
    tensors = {name: tensor(array) for name, array in sources.items()}
    variables, report = convert.load(PATH, tensors, TABLE, shapes, unused)
    assert tensors == {}
    return variables, report


def test_layouts_permute_the_axes():
    linear = numbers(2, 3)
    transposed_linear = convert.LAYOUTS["linear"](linear)
    assert transposed_linear.shape == (3, 2)
    assert all(transposed_linear[i, o] == linear[o, i] for o, i in np.ndindex(2, 3))
    kernel = numbers(2, 3, 4, 5)
    conv = convert.LAYOUTS["conv"](kernel)
    transposed = convert.LAYOUTS["conv_transpose"](kernel)
    patches = convert.LAYOUTS["patches"](kernel)
    assert conv.shape == (4, 5, 3, 2)
    assert transposed.shape == (4, 5, 2, 3)
    assert patches.shape == (60, 2)
    for a, b, h, w in np.ndindex(2, 3, 4, 5):
        assert conv[h, w, b, a] == kernel[a, b, h, w]
        assert transposed[h, w, a, b] == kernel[a, b, h, w]
        assert patches[(h * 5 + w) * 3 + b, a] == kernel[a, b, h, w]
    np.testing.assert_array_equal(convert.LAYOUTS["same"](kernel), kernel)


def test_every_parameter_is_loaded_and_reported():
    unused_arrays = {"buffer": numbers(2), "other.buffer": numbers(1)}
    variables, report = load(arrays() | unused_arrays, [r"(.*\.)?buffer"])
    assert {name: array.shape for name, array in variables.items()} == SHAPES
    for o, i in np.ndindex(2, 3):
        assert variables["params/qkv/kernel"][i, o] == arrays()["q.weight"][o, i]
        assert variables["params/qkv/kernel"][i, 2 + o] == arrays()["k.weight"][o, i]
    np.testing.assert_array_equal(variables["params/qkv/bias"], [0, 1, 100, 101])
    np.testing.assert_array_equal(variables["params/norm/bias"], [100, 101, 102, 103, 104])
    assert variables["params/scale"] == 7
    assert all(array.flags.c_contiguous for array in variables.values())
    assert set(report.loaded) == set(SHAPES)
    reshaped = {"params/qkv/kernel", "params/qkv/bias", "params/conv/kernel"}
    assert set(report.reshaped) == reshaped
    assert report.unused == ("buffer", "other.buffer")
    assert report.fresh == ()
    message = "6 loaded, of which 3 reshaped; 2 unused, 0 fresh\nunused: buffer, other.buffer"
    assert str(report) == message


def test_parameters_outside_the_table_are_fresh():
    _, report = load(arrays(), shapes=SHAPES | {"params/new/b": (2,), "params/new/a": (3,)})
    assert report.fresh == ("params/new/a", "params/new/b")
    assert "0 unused, 2 fresh\nfresh: params/new/a, params/new/b" in str(report)


@pytest.mark.parametrize("dtype", ["float16", "float64", jnp.bfloat16])
def test_every_source_becomes_float32(dtype):
    sources = {name: np.asarray(array, dtype) for name, array in arrays().items()}
    variables, _ = load(sources)
    assert {array.dtype for array in variables.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(variables["params/qkv/kernel"][:, 0], [0, 1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k.bias": None}, r"source\.bin: k\.bias is missing; give the whole checkpoint"),
        ({"q.bias": None, "scale": None}, r"q\.bias, scale are missing"),
        ({"extra": numbers(1)}, r"extra is not used by this model"),
        (
            {f"x{i}": numbers(1) for i in range(7)},
            r"x0, x1, x2, x3, x4 and 2 more are not used by this model",
        ),
        ({f"x{i}": numbers(1) for i in range(5)}, r"x0, x1, x2, x3, x4 are not used"),
        ({"ln.bias": numbers(4)}, r"ln\.bias has shape \(4,\).*params/norm/bias \(5,\)"),
        ({"k.weight": numbers(2, 4)}, r"q\.weight, k\.weight has shape \(2, 3\), \(2, 4\)"),
        ({"k.weight": numbers(3, 3)}, r"q\.weight, k\.weight has shape .*qkv/kernel \(3, 4\)"),
        ({"k.weight": numbers(6)}, r"k\.weight has shape \(6,\); expected 2 axes"),
        ({"conv.weight": numbers(6, 2, 3)}, r"conv\.weight has shape .*expected 4 axes"),
        ({"scale": numbers(1)}, r"scale has shape \(1,\)"),
        (dict.fromkeys(arrays()), r" and 3 more are missing"),
    ],
)
def test_error_names_the_invalid_arrays(change, message):
    sources = {name: array for name, array in (arrays() | change).items() if array is not None}
    with pytest.raises(UserError, match=message):
        load(sources)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "complex64"])
def test_rejects_an_array_that_is_not_floating_point(dtype):
    sources = arrays() | {"k.weight": numbers(2, 3, dtype=dtype)}
    with pytest.raises(
        UserError, match=rf"source\.bin: k\.weight is of {dtype}; expected .*float32"
    ):
        load(sources)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", jnp.bfloat16])
def test_rejects_an_array_with_nan_or_infinity(value, dtype):
    array = np.asarray(arrays()["conv.weight"], dtype)
    array[3, 1, 2, 0] = value
    with pytest.raises(UserError, match=r"source\.bin: conv\.weight contains NaN or infinity"):
        load(arrays() | {"conv.weight": array})


def test_rejects_a_number_beyond_float32():
    with (
        pytest.raises(UserError, match=r"scale contains NaN or infinity"),
        np.errstate(over="ignore"),
    ):
        load(arrays() | {"scale": np.array(1e300)})


def test_an_unused_array_may_be_integer():
    _, report = load(arrays() | {"position_ids": numbers(2, dtype="int64")}, ["position_ids"])
    assert report.unused == ("position_ids",)


def test_a_name_in_the_table_is_used_even_if_it_matches_unused():
    _, report = load(arrays(), [r".*"])
    assert report.unused == ()


def standard(names, format="torch"):
    sources = {name: tensor(array) for name, array in names.items()}
    return convert.standard_names(Checkpoint(PATH, format, sources))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(prefix):
    assert set(standard({f"{prefix}{name}": numbers(1) for name in "ab"})) == {"a", "b"}


def test_a_prefix_that_not_all_names_have_is_kept():
    assert set(standard({"module.a": numbers(1), "b": numbers(1)})) == {"module.a", "b"}


def test_old_names_of_layer_norm_are_replaced():
    result = standard({"x.LayerNorm.gamma": numbers(2), "x.LayerNorm.beta": numbers(3)})
    assert {name: t.shape for name, t in result.items()} == {
        "x.LayerNorm.weight": (2,),
        "x.LayerNorm.bias": (3,),
    }
    assert set(standard({"gamma": numbers(1)})) == {"gamma"}


def test_flax_names_and_axes_become_those_of_torch():
    sources = {
        "a/kernel": numbers(2, 3),
        "a/bias": numbers(3),
        "conv/kernel": numbers(2, 3, 4, 5),
        "norm/scale": numbers(3),
        "words/embedding": numbers(4, 3),
        "logit_scale": numbers(),
    }
    result = standard(sources, "flax")
    assert {name: t.shape for name, t in result.items()} == {
        "a.weight": (3, 2),
        "a.bias": (3,),
        "conv.weight": (5, 4, 2, 3),
        "norm.weight": (3,),
        "words.weight": (4, 3),
        "logit_scale": (),
    }
    np.testing.assert_array_equal(result["a.weight"].read(), sources["a/kernel"].T)
    kernel = result["conv.weight"].read()
    assert all(
        kernel[o, i, h, w] == sources["conv/kernel"][h, w, i, o]
        for h, w, i, o in np.ndindex(2, 3, 4, 5)
    )
    np.testing.assert_array_equal(result["words.weight"].read(), sources["words/embedding"])
