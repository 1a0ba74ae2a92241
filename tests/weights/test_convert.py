"""Foreign arrays to ours: axes, dtypes, names, and what is wrong with a file."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.weights import convert, keys
from biclip_jax.weights.formats.tensor import Tensor
from biclip_jax.weights.readers import Checkpoint

PATH = Path("given.bin")
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


def load(held, unused=(), shapes=SHAPES):
    tensors = {name: tensor(array) for name, array in held.items()}
    variables, report = convert.load(PATH, tensors, TABLE, shapes, unused)
    assert tensors == {}
    return variables, report


def test_layouts_move_each_axis_where_it_belongs():
    linear = numbers(2, 3)
    moved = convert.LAYOUTS["linear"](linear)
    assert moved.shape == (3, 2)
    assert all(moved[i, o] == linear[o, i] for o, i in np.ndindex(2, 3))
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


def test_every_parameter_is_filled_and_the_report_counts_them():
    needless = {"buffer": numbers(2), "other.buffer": numbers(1)}
    variables, report = load(arrays() | needless, [r"(.*\.)?buffer"])
    assert {name: array.shape for name, array in variables.items()} == SHAPES
    for o, i in np.ndindex(2, 3):
        assert variables["params/qkv/kernel"][i, o] == arrays()["q.weight"][o, i]
        assert variables["params/qkv/kernel"][i, 2 + o] == arrays()["k.weight"][o, i]
    np.testing.assert_array_equal(variables["params/qkv/bias"], [0, 1, 100, 101])
    np.testing.assert_array_equal(variables["params/norm/bias"], [100, 101, 102, 103, 104])
    assert variables["params/scale"] == 7
    assert all(array.flags.c_contiguous for array in variables.values())
    assert set(report.loaded) == set(SHAPES)
    joined = {"params/qkv/kernel", "params/qkv/bias", "params/conv/kernel"}
    assert set(report.reshaped) == joined
    assert report.unused == ("buffer", "other.buffer")
    assert report.fresh == ()
    said = "6 loaded, of which 3 reshaped; 2 unused, 0 fresh\nunused: buffer, other.buffer"
    assert str(report) == said


def test_parameters_that_the_table_does_not_fill_are_fresh():
    _, report = load(arrays(), shapes=SHAPES | {"params/new/b": (2,), "params/new/a": (3,)})
    assert report.fresh == ("params/new/a", "params/new/b")
    assert "0 unused, 2 fresh\nfresh: params/new/a, params/new/b" in str(report)


@pytest.mark.parametrize("dtype", ["float16", "float64", jnp.bfloat16])
def test_every_source_becomes_float32(dtype):
    held = {name: np.asarray(array, dtype) for name, array in arrays().items()}
    variables, _ = load(held)
    assert {array.dtype for array in variables.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(variables["params/qkv/kernel"][:, 0], [0, 1, 2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k.bias": None}, r"given\.bin: k\.bias is missing; give the whole checkpoint"),
        ({"q.bias": None, "scale": None}, r"q\.bias, scale are missing"),
        ({"extra": numbers(1)}, r"extra is of no use in this model"),
        (
            {f"x{i}": numbers(1) for i in range(7)},
            r"x0, x1, x2, x3, x4 and 2 more are of no use in this model",
        ),
        ({f"x{i}": numbers(1) for i in range(5)}, r"x0, x1, x2, x3, x4 are of no use"),
        ({"ln.bias": numbers(4)}, r"ln\.bias has shape \(4,\).*params/norm/bias \(5,\)"),
        ({"k.weight": numbers(2, 4)}, r"q\.weight, k\.weight has shape \(2, 3\), \(2, 4\)"),
        ({"k.weight": numbers(3, 3)}, r"q\.weight, k\.weight has shape .*qkv/kernel \(3, 4\)"),
        ({"k.weight": numbers(6)}, r"k\.weight has shape \(6,\); expected 2 axes"),
        ({"conv.weight": numbers(6, 2, 3)}, r"conv\.weight has shape .*expected 4 axes"),
        ({"scale": numbers(1)}, r"scale has shape \(1,\)"),
        (dict.fromkeys(arrays()), r" and 3 more are missing"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(change, said):
    held = {name: array for name, array in (arrays() | change).items() if array is not None}
    with pytest.raises(UserError, match=said):
        load(held)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "complex64"])
def test_an_array_that_is_not_floating_point_is_named(dtype):
    held = arrays() | {"k.weight": numbers(2, 3, dtype=dtype)}
    with pytest.raises(
        UserError, match=rf"given\.bin: k\.weight is of {dtype}; expected .*float32"
    ):
        load(held)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", jnp.bfloat16])
def test_an_array_of_numbers_that_are_none_is_named(value, dtype):
    array = np.asarray(arrays()["conv.weight"], dtype)
    array[3, 1, 2, 0] = value
    with pytest.raises(UserError, match=r"given\.bin: conv\.weight holds NaN or infinity"):
        load(arrays() | {"conv.weight": array})


def test_a_number_past_float32_is_named():
    with pytest.raises(UserError, match=r"scale holds NaN or infinity"), np.errstate(over="ignore"):
        load(arrays() | {"scale": np.array(1e300)})


def test_a_needless_array_may_be_of_integers():
    _, report = load(arrays() | {"position_ids": numbers(2, dtype="int64")}, ["position_ids"])
    assert report.unused == ("position_ids",)


def test_a_needless_name_that_the_table_wants_is_used():
    _, report = load(arrays(), [r".*"])
    assert report.unused == ()


def standard(names, format="torch"):
    held = {name: tensor(array) for name, array in names.items()}
    return convert.standard_names(Checkpoint(PATH, format, held))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_prefixes_of_wrappers_are_dropped(prefix):
    assert set(standard({f"{prefix}{name}": numbers(1) for name in "ab"})) == {"a", "b"}


def test_a_prefix_that_not_all_have_stays():
    assert set(standard({"module.a": numbers(1), "b": numbers(1)})) == {"module.a", "b"}


def test_the_old_names_of_layer_norm_are_the_new_ones():
    found = standard({"x.LayerNorm.gamma": numbers(2), "x.LayerNorm.beta": numbers(3)})
    assert {name: t.shape for name, t in found.items()} == {
        "x.LayerNorm.weight": (2,),
        "x.LayerNorm.bias": (3,),
    }
    assert set(standard({"gamma": numbers(1)})) == {"gamma"}


def test_flax_s_names_and_axes_become_torch_s():
    held = {
        "a/kernel": numbers(2, 3),
        "a/bias": numbers(3),
        "conv/kernel": numbers(2, 3, 4, 5),
        "norm/scale": numbers(3),
        "words/embedding": numbers(4, 3),
        "logit_scale": numbers(),
    }
    found = standard(held, "flax")
    assert {name: t.shape for name, t in found.items()} == {
        "a.weight": (3, 2),
        "a.bias": (3,),
        "conv.weight": (5, 4, 2, 3),
        "norm.weight": (3,),
        "words.weight": (4, 3),
        "logit_scale": (),
    }
    np.testing.assert_array_equal(found["a.weight"].read(), held["a/kernel"].T)
    kernel = found["conv.weight"].read()
    assert all(
        kernel[o, i, h, w] == held["conv/kernel"][h, w, i, o]
        for h, w, i, o in np.ndindex(2, 3, 4, 5)
    )
    np.testing.assert_array_equal(found["words.weight"].read(), held["words/embedding"])
