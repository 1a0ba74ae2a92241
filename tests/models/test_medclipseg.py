"""MedCLIPSeg: attention, adapters and head against NumPy; noise, samples, gradients, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, ndtr, softmax

from biclip_jax.models import adapters, clip, medclipseg, transformer
from biclip_jax.models.transformer import fold_keys
from tests import tiny_medclipseg as tiny
from tests.models import numpy_reference
from tests.models.numpy_reference import dense, norm

RNG = np.random.default_rng(0)
FIELDS = tiny.fields()
MODEL = medclipseg.build(FIELDS)
apply = jax.jit(MODEL.apply)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.fixture(autouse=True, scope="module")
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def variables():
    return tiny.variables(MODEL)


@pytest.fixture(scope="module")
def inputs():
    """Returns images in [0, 1] and ids."""
    batch = tiny.batch()
    return batch["image"].astype(jnp.float32) / 255, batch["text_ids"]


def noise_arrays(keys):
    """Returns the noise arrays equivalent to keys; array i depends on the example's key and i."""
    shapes = medclipseg.noise_shapes(MODEL, len(keys), tiny.MAX_LENGTH)
    return [
        jnp.stack([jax.random.normal(jax.random.fold_in(key, i), shape[1:]) for key in keys])
        for i, shape in enumerate(shapes)
    ]


@pytest.fixture(scope="module")
def outputs(variables, inputs):
    """Returns logits and intermediates of a pass with noise."""
    return apply(variables, *inputs, noise=noise_arrays(tiny.keys()))


# --- NumPy references ---


def attention(params, x, context, noise, beta):
    """Computes the probabilistic attention from the formulas of the paper and its code."""
    width = x.shape[-1]
    query = dense(params["query"], x)
    key, value = (dense(params[name], context) for name in ("key", "value"))
    key_mean = norm(params["norm_key"], key[..., :width], 1e-5)
    value_mean = norm(params["norm_value"], value[..., :width], 1e-5)
    key_var, value_var = (np.logaddexp(0, z[..., width:]) + 1e-6 for z in (key, value))
    out = np.zeros(x.shape)
    for b in range(len(x)):
        for q in range(x.shape[1]):
            scores = key_mean[b] @ query[b, q] / math.sqrt(width)
            spread = key_var[b] @ query[b, q] ** 2 / width
            sampled = value_mean[b] + np.sqrt(value_var[b]) * np.asarray(noise[b], float)
            out[b, q] = softmax(scores - beta * np.sqrt(spread)) @ sampled
    gate = expit(float(params["gate"]))
    return gate * dense(params["out"], out) + (1 - gate) * np.asarray(x, float)


@pytest.mark.parametrize("beta", [0.0, 2.35])
def test_attention_matches_numpy(beta):
    x, context, noise = normal(2, 5, 4), normal(2, 3, 4), normal(2, 3, 4)
    module = adapters.ProbabilisticAttention(4, beta)
    variables = numpy_reference.noise(module, x, context, amount=0.6)
    params = variables["params"]
    expected = attention(params, x, context, noise, beta)
    np.testing.assert_allclose(module.apply(variables, x, context, noise), expected, atol=1e-5)
    expected = attention(params, x, context, 0 * noise, beta)
    np.testing.assert_allclose(module.apply(variables, x, context), expected, atol=1e-5)


def adapt(params, x, u, noise, update=True):
    """Computes an adapter; without `update`, the text attends to the original image stream."""
    image, text = (
        np.asarray(s, float) @ params[f"{n}_down"]["kernel"] for s, n in ((x, "image"), (u, "text"))
    )
    updated = attention(params["image_from_text"], image, text, noise[0], 2.35)
    context = updated if update else image
    text = attention(params["text_from_image"], text, context, noise[1], 2.35)
    return updated @ params["image_up"]["kernel"], text @ params["text_up"]["kernel"]


def test_text_attends_to_the_updated_image_stream():
    x, u, noise = normal(2, 5, 6), normal(2, 3, 7), [normal(2, 3, 4), normal(2, 5, 4)]
    adapter = adapters.Adapter(6, 7, 4)
    variables = numpy_reference.noise(adapter, x, u, amount=0.6)
    params = jax.tree.map(np.asarray, variables["params"])
    dx, du = adapter.apply(variables, x, u, noise)
    image, text = adapt(params, x, u, noise)
    np.testing.assert_allclose(dx, image, atol=1e-5)
    np.testing.assert_allclose(du, text, atol=1e-5)
    _, other = adapt(params, x, u, noise, update=False)
    assert np.abs(other - text).max() > 1e-2
    shorter, _ = adapter.apply(variables, x, u[:, :2])
    dx, du = adapter.apply(variables, x, u)
    assert np.abs(shorter - dx).max() > 1e-2  # padding is attended to
    image, text = adapt(params, x, u, [0 * part for part in noise])
    np.testing.assert_allclose(dx, image, atol=1e-5)
    np.testing.assert_allclose(du, text, atol=1e-5)


def upscaled(params, x):
    """Computes an upscaler pixel by pixel."""
    x = np.asarray(x, float)
    b, h, w, c = x.shape
    y = np.zeros((b, 2 * h, 2 * w, c))
    kernel = np.asarray(params["up"]["kernel"], float)
    for i, j, p, q in np.ndindex(h, w, 2, 2):
        y[:, 2 * i + p, 2 * j + q] = x[:, i, j] @ kernel[p, q] + params["up"]["bias"]
    y = np.pad(y * ndtr(y), ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((b, 2 * h, 2 * w, c))
    for i, j, p, q in np.ndindex(2 * h, 2 * w, 3, 3):
        out[:, i, j] += y[:, i + p, j + q] * params["depthwise"][p, q]
    return norm(params["norm"], out, 1e-6)


def test_upscaler_matches_numpy():
    x, module = normal(2, 3, 2, 4), medclipseg.Upscaler(4)
    variables = numpy_reference.noise(module, x, amount=0.6)
    expected = upscaled(jax.tree.map(np.asarray, variables["params"]), x)
    np.testing.assert_allclose(module.apply(variables, x), expected, atol=2e-5)


@pytest.mark.parametrize("num_upscales", [0, 1])
def test_head_matches_numpy(num_upscales):
    features, text = normal(2, 4, 6), normal(2, 6)
    module = medclipseg.Head(num_upscales)
    variables = numpy_reference.noise(module, features, text, amount=0.6)
    params = jax.tree.map(np.asarray, variables["params"])
    unit = np.asarray(features, float)
    unit = unit / np.sqrt((unit**2).sum(-1, keepdims=True))
    maps = np.stack([unit[:, :2], unit[:, 2:]], 1)
    for i in range(num_upscales):
        maps = upscaled(params[f"up_{i}"], maps)
    query = np.asarray(text, float) / np.sqrt((np.asarray(text, float) ** 2).sum(-1, keepdims=True))
    for i in range(3):
        query = dense(params[f"mlp_{i}"], query * ndtr(query) if i else query)
    expected = (maps * query[:, None, None]).sum(-1)
    found = module.apply(variables, features, text)
    assert found.shape == (2, 2 * 2**num_upscales, 2 * 2**num_upscales)
    np.testing.assert_allclose(found, expected, atol=5e-5)
    rescaled = module.apply(variables, 3.0 * features, 0.1 * text)
    np.testing.assert_allclose(rescaled, expected, atol=5e-5)


def test_initialisation_has_the_published_bounds():
    """U(-1 / sqrt(fan_in), ...); the fan-in of a transposed kernel is its outputs: 4 x 32."""
    module, x = medclipseg.Upscaler(32), jnp.zeros((1, 2, 2, 32))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    attention, x = adapters.ProbabilisticAttention(32, gate_init=-0.02), jnp.ones((1, 1, 32))
    assert attention.beta == 2.35
    others = jax.jit(attention.init)(jax.random.key(0), x, x)["params"]
    up = [(params["up"]["kernel"], 128), (params["up"]["bias"], 128), (params["depthwise"], 9)]
    layers = [others[name] for name in ("query", "key", "value", "out")]
    assert float(others["gate"]) == pytest.approx(-0.02)
    for value, fan_in in up + [(leaf, 32) for layer in layers for leaf in layer.values()]:
        bound = fan_in**-0.5
        assert 0.85 * bound < np.abs(value).max() <= bound
        assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)


# --- forward pass ---


def test_pass_returns_logits_and_intermediates(outputs):
    logits, aux = outputs
    assert logits.shape == (4, 32, 32, 1)
    assert {name: value.shape for name, value in aux.items()} == {
        "features": (4, 16, 12),
        "text": (4, 12),
        "low_logits": (4, 8, 8),
    }
    low = np.asarray(aux["low_logits"], float)
    # Half-pixel centres: pixel 4 i + k is (k + 0.5) / 4 - 0.5 away from i, clamped at the edge.
    position = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    first = np.minimum(position.astype(int), 6)
    weight, rows, fraction = np.zeros((32, 8)), np.arange(32), position - first
    weight[rows, first], weight[rows, first + 1] = 1 - fraction, fraction
    expected = np.einsum("ih,bhw,jw->bij", weight, low, weight)
    np.testing.assert_allclose(logits[..., 0], expected, atol=1e-5)


def test_noise_has_a_text_and_an_image_array_per_adapter():
    shapes = medclipseg.noise_shapes(MODEL, 4, tiny.MAX_LENGTH)
    assert shapes == [(4, 6, 8), (4, 17, 8), (4, 6, 8), (4, 17, 8)]
    full = medclipseg.build(
        {**FIELDS, **medclipseg.ENCODERS["clip"], "num_layers": 10, "adapter_width": 256}
    )
    assert medclipseg.noise_shapes(full, 2, 77) == [(2, 77, 256), (2, 197, 256)] * 10


def test_logits_depend_on_every_noise_array(variables, inputs, outputs):
    arrays, (logits, _) = noise_arrays(tiny.keys()), outputs
    for i in range(len(arrays)):
        noise = [(i != j) * part for j, part in enumerate(arrays)]
        without, _ = apply(variables, *inputs, noise=noise)
        assert np.abs(without - logits).max() > 1e-4 * np.abs(logits).max(), i


@pytest.mark.slow
def test_keys_are_equivalent_to_arrays_and_none_to_zeros(variables, inputs, outputs):
    with_keys, _ = apply(variables, *inputs, noise=tiny.keys())
    np.testing.assert_allclose(with_keys, outputs[0], atol=1e-5)
    zeros, _ = apply(variables, *inputs, noise=[0 * part for part in noise_arrays(tiny.keys())])
    none, _ = apply(variables, *inputs)
    np.testing.assert_allclose(none, zeros, atol=1e-5)
    assert np.abs(none - with_keys).max() > 1e-2 * np.abs(none).max()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["unimedclip", "clip"])
def test_padding_changes_the_logits(inputs, variant):
    """Padding cannot be truncated to save time."""
    model = medclipseg.build(tiny.fields(variant))
    variables, (image, ids) = tiny.variables(model), inputs
    assert not ids[:, 5:].any()
    padded, truncated = (
        jax.jit(model.apply)(variables, image, part)[0] for part in (ids, ids[:, :5])
    )
    assert np.abs(padded - truncated).max() > 1e-3 * np.abs(padded).max()


@pytest.mark.parametrize("input", ["clip", "imagenet_bgr"])
def test_model_normalises_images(input):
    image = np.random.default_rng(0).random((1, 2, 2, 3)).astype(np.float32)
    model = MODEL.clone(input=input)
    expected = (image - np.array(clip.MEAN)) / np.array(clip.STD)
    if input == "imagenet_bgr":
        expected = (image[..., [2, 1, 0]] - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(model.normalise(jnp.asarray(image)), expected, atol=1e-5)


def test_dropout_depends_on_the_key_of_the_example():
    """A share `rate` of the values is 0; the others are scaled by 1 / (1 - rate)."""
    x, keys = jnp.ones((3, 51, 41)), tiny.keys(3)
    dropped = np.asarray(transformer.drop(x, keys, 0.1))
    assert set(np.unique(dropped).tolist()) == {0.0, np.float32(1 / 0.9).item()}
    np.testing.assert_allclose((dropped == 0).mean((1, 2)), 0.1, atol=0.03)
    np.testing.assert_array_equal(transformer.drop(x[1:2], keys[1:2], 0.1)[0], dropped[1])
    assert (dropped[0] != dropped[1]).any()


def test_block_dropout_needs_keys_and_a_rate():
    x, keys = normal(2, 4, 6), tiny.keys(2)
    block = transformer.Block(2, 8, dropout=0.5)
    variables = numpy_reference.noise(block, x)
    expected = transformer.Block(2, 8).apply(variables, x)
    np.testing.assert_array_equal(block.apply(variables, x), expected)
    np.testing.assert_array_equal(transformer.Block(2, 8).apply(variables, x, keys=keys), expected)
    first, second = (block.apply(variables, x, keys=keys) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - expected).max() > 0.1


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.slow
def test_block_with_row_computes_that_row(post_norm):
    x, rows = normal(3, 4, 6), jnp.array([2, 0, 3])
    block = transformer.Block(2, 8, post_norm=post_norm)
    variables = numpy_reference.noise(block, x)
    causal = jnp.tril(jnp.ones((1, 1, 4, 4), bool))
    padded = (jnp.arange(4) < jnp.array([[3], [4], [4]]))[:, None, None]
    for mask in (None, causal, padded):
        expected = block.apply(variables, x, mask)
        found = block.apply(variables, x, mask, row=rows)
        np.testing.assert_allclose(found[:, 0], expected[jnp.arange(3), rows], atol=1e-5)


def test_values_only_returns_projected_values():
    x = normal(2, 4, 6)
    block = transformer.Block(2, 8)
    variables = numpy_reference.noise(block, x)
    params = jax.tree.map(np.asarray, variables["params"])
    attention = params["attention"]
    values = dense(attention["qkv"], norm(params["norm_0"], x, 1e-5))[..., 12:]
    expected = dense(attention["out"], values)
    np.testing.assert_allclose(block.apply(variables, x, values_only=True), expected, atol=1e-5)


# --- samples ---


def entropy(p):
    p = np.asarray(p, float)
    return -(p * np.log(p + 1e-8) + (1 - p) * np.log(1 - p + 1e-8))


@functools.partial(jax.jit, static_argnums=0)
def statistics(chunk, variables, image, ids, keys):
    return medclipseg.sample_statistics(MODEL, variables, image, ids, None, keys, 4, chunk)


@pytest.fixture(scope="module")
def samples(variables, inputs):
    """Returns statistics of four passes in chunks of two, because 3 does not divide 4."""
    return statistics(3, variables, *inputs, tiny.keys())


def test_samples_match_single_passes_with_folded_keys(variables, inputs, samples):
    passes = [
        apply(variables, *inputs, noise=noise_arrays(fold_keys(tiny.keys(), s)))[0]
        for s in range(4)
    ]
    probs = expit(np.asarray(passes, float))
    assert probs.std(0).max() > 1e-3
    np.testing.assert_allclose(samples.mean, probs.mean(0), atol=1e-5)
    np.testing.assert_allclose(samples.total, entropy(probs.mean(0)), atol=1e-5)
    np.testing.assert_allclose(samples.aleatoric, entropy(probs).mean(0), atol=1e-5)


def test_samples_do_not_depend_on_other_examples(variables, inputs, samples):
    image, ids = inputs
    order = jnp.array([0, 3, 3, 2])
    reordered = statistics(3, variables, image[order], ids[order], tiny.keys()[order])
    for found, expected in zip(reordered, samples, strict=True):
        np.testing.assert_allclose(found, expected[order], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_chunk_size_does_not_change_the_statistics(variables, inputs, samples, chunk):
    found = statistics(chunk, variables, *inputs, tiny.keys())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, samples)


def test_uncertainty_is_the_sum_of_its_parts_and_bounded(samples):
    assert samples.mean.shape == samples.epistemic.shape == (4, 32, 32, 1)
    np.testing.assert_allclose(samples.aleatoric + samples.epistemic, samples.total, atol=1e-6)
    for part in samples:
        assert (np.asarray(part) >= -1e-7).all()
    assert np.asarray(samples.total).max() <= math.log(2) + 1e-6
    assert np.asarray(samples.epistemic).max() > 1e-4


# --- gradients and errors ---


def num_backward_products(function, params):
    """Counts the matrix products that the backward pass adds to a function."""

    def forward_and_backward(params):
        output, vjp_fn = jax.vjp(function, params)
        return vjp_fn(output)

    programs = [jax.jit(fn).lower(params).as_text() for fn in (function, forward_and_backward)]
    return programs[1].count("dot_general") - programs[0].count("dot_general")


def test_blocks_before_the_first_adapter_are_not_differentiated(variables, inputs):
    """Up to the first noise the backward pass contains only one adapter's `prepare`."""
    params = {k: v for k, v in variables["params"].items() if k not in medclipseg.FROZEN}
    frozen = {k: v for k, v in variables["params"].items() if k in medclipseg.FROZEN}
    image, ids = inputs
    adapter = adapters.Adapter(tiny.IMAGE_WIDTH, tiny.TEXT_WIDTH, tiny.ADAPTER_WIDTH)
    x, u = normal(4, 17, tiny.IMAGE_WIDTH), normal(4, 6, tiny.TEXT_WIDTH)

    def begin(params):
        merged = {"params": {**params, **frozen}}
        return MODEL.apply(merged, image, ids, method=MODEL.begin)._replace(mask=0.0, row=0.0)

    def prepare(params):
        return adapter.apply({"params": params["adapters_0"]}, x, u, method=adapter.prepare)

    assert set(params) == {"adapters_0", "adapters_1", "head"}
    assert num_backward_products(begin, params) == num_backward_products(prepare, params) > 0


RESNET = {"kind": "resnet", "image_size": 32, "width": 2, "stages": (1, 1, 1, 1)}
RESNET |= {"num_heads": 1, "embedding_size": 12}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": RESNET}, "a resnet; MedCLIPSeg needs a ViT"),
        ({"image": FIELDS["image"] | {"num_layers": 4}}, "have 4 and 3 blocks, and there are 2"),
        ({"num_layers": 3}, "have 3 and 3 blocks, and there are 3 adapters; expected encoders of"),
        ({"num_layers": 0}, "there are 0 adapters"),
    ],
)
def test_rejects_incompatible_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        medclipseg.build({**FIELDS, **changes})


@pytest.mark.parametrize("variant", medclipseg.ENCODERS)
def test_bfloat16_streams_give_close_logits(variant):
    """bfloat16 has 8 bits of precision: the error is one or two percent of the largest logit."""
    ids = tiny.batch(2)["text_ids"]
    image = jnp.asarray(np.random.default_rng(1).random((2, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)))
    wide, narrow = (
        medclipseg.build(tiny.fields(variant, dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    variables = tiny.variables(wide)
    expected, _ = jax.jit(wide.apply)(variables, image, ids)
    state = jax.eval_shape(lambda *args: narrow.apply(*args, method="begin"), variables, image, ids)
    assert {part.dtype for part in (state.image, state.text)} == {jnp.dtype("bfloat16")}
    found, _ = jax.jit(narrow.apply)(variables, image, ids)
    assert found.dtype == jnp.float32
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < difference < 0.05


def test_rejects_noise_of_other_shapes(variables, inputs):
    arrays = noise_arrays(tiny.keys())
    with pytest.raises(ValueError, match=r"has 3 arrays; expected 4 \(see noise_shapes\)"):
        MODEL.apply(variables, *inputs, noise=arrays[:3])
    shared = [part[:1] for part in arrays]  # would broadcast to all images
    with pytest.raises(ValueError, match=r"adapter 0 has the shapes .*expected \[\(4, 6, 8\)"):
        MODEL.apply(variables, *inputs, noise=shared)
    with pytest.raises(ValueError, match=r"keys of shape \(2,\); expected one per example, \(4,\)"):
        # Not through `__call__`: the tests check its annotations, other programs do not.
        MODEL.apply(variables, tiny.keys(2), 0, jnp.ones((4, 6, 2)), inputs[0], method="_noise")


def test_rejects_images_of_another_size(variables, inputs):
    image, ids = inputs
    with pytest.raises(ValueError, match="images are 24 x 32; expected 32 x 32, the size of the"):
        MODEL.apply(variables, image[:, :24], ids)
