"""Fusion at the U-Net's levels: zero initialisation, NumPy references, disabled directions."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy.special import erf

from biclip_jax.configs import variants
from biclip_jax.models import biclip, fusion
from biclip_jax.models.unet import DoubleConv, UNet, block_names
from tests import tiny

RNG = np.random.default_rng(0)
FEATURES = jnp.asarray(RNG.standard_normal((2, 4, 6, 3)), jnp.float32)
TEXT = jnp.asarray(RNG.standard_normal((2, 10)), jnp.float32)


def random_params(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda x: RNG.standard_normal(x.shape).astype(np.float32), shapes)


def mlp_by_hand(params, x):
    """Linear, LayerNorm, GELU(erf), Linear in float64."""
    x = x @ params["in"]["kernel"].astype(np.float64) + params["in"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    x = x * (1 + erf(x / np.sqrt(2))) / 2
    return x @ params["out"]["kernel"].astype(np.float64) + params["out"]["bias"]


@pytest.mark.parametrize("text_to_vision", [True, False])
@pytest.mark.parametrize("vision_to_text", [True, False])
def test_level_fusion_matches_numpy(vision_to_text, text_to_vision):
    """t' = t + g([t; mean F]); F' = F (1 + gamma(t')) + beta(t'), with directions disabled."""
    module = fusion.LevelFusion(vision_to_text, text_to_vision, hidden=5)
    shapes = jax.eval_shape(module.init, jax.random.key(0), FEATURES, TEXT)
    enabled = {"refiner": vision_to_text, "modulation": text_to_vision}
    names = {name for name, is_enabled in enabled.items() if is_enabled}
    assert set(shapes.get("params", {})) == names
    params = random_params(module, FEATURES, TEXT) if names else {}
    features, text = (np.asarray(x, np.float64) for x in (FEATURES, TEXT))
    if vision_to_text:
        concatenated = np.concatenate([text, features.mean((1, 2))], axis=-1)
        text = text + mlp_by_hand(params["refiner"]["mlp"], concatenated)
    if text_to_vision:
        kernel, bias = params["modulation"]["kernel"], params["modulation"]["bias"]
        gamma, beta = np.split((text @ kernel + bias)[:, None, None], 2, axis=-1)
        features = features * (1 + gamma) + beta
    with jax.default_matmul_precision("highest"):
        found, refined = module.apply({"params": params}, FEATURES, TEXT)
    np.testing.assert_allclose(found, features, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(refined, text, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_initial_fused_unet_equals_plain_unet(norm):
    fused = UNet((2, 4, 8), norm=norm, fused_blocks=block_names(3), fusion_hidden=5)
    plain = fused.clone(fused_blocks=())
    x = jnp.asarray(RNG.standard_normal((2, 8, 8, 6)), jnp.float32)
    variables = jax.jit(fused.init, static_argnums=2)(jax.random.key(0), x, False, TEXT)
    plain_variables = {
        **variables,
        "params": {k: v for k, v in variables["params"].items() if not k.startswith("fusion_")},
    }
    assert len(variables["params"]) == len(plain_variables["params"]) + 5
    expected, expected_features = plain.apply(plain_variables, x, False)
    found, features = fused.apply(variables, x, False, TEXT)
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, features, expected_features)
    perturbed = tiny.noisy({"batch_stats": {}, **variables})
    first, second = (fused.apply(perturbed, x, False, text)[0] for text in (TEXT, -TEXT))
    assert np.abs(first - second).max() > 1e-4


@pytest.mark.slow
def test_initial_full_model_equals_model_without_levels():
    model, ids = tiny.model(method="full"), jnp.zeros((1, tiny.MAX_LENGTH), jnp.int32)
    variables = biclip.init(model, jax.random.key(0), {"text_ids": ids, "text_mask": ids == 0})
    params = variables["params"]
    unet = {k: v for k, v in params["unet"].items() if not k.startswith("fusion_")}
    plain = {**variables, "params": {**params, "unet": unet}}
    batch = tiny.batch(2)
    image, prompt = biclip.to_unit_rgb(batch["image"]), biclip.text_inputs(batch)
    found, _ = model.apply(variables, image, **prompt)
    expected, _ = model.clone(levels=()).apply(plain, image, **prompt)
    np.testing.assert_array_equal(found, expected)


def test_levels_refine_text_in_data_flow_order():
    """The refiner of each level receives the text of the previous one."""
    calls = []
    module = UNet((2, 4), fused_blocks=("encoder_1", "decoder_0"), fusion_hidden=5)
    x = jnp.asarray(RNG.standard_normal((2, 8, 8, 3)), jnp.float32)
    variables = module.init(jax.random.key(0), x, False, TEXT)

    def record_call(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, fusion.LevelFusion):
            calls.append((context.module.name, args[1], out[1]))
        return out

    with nn.intercept_methods(record_call):
        module.apply(variables, x, False, TEXT)
    assert [name for name, *_ in calls] == ["fusion_encoder_1", "fusion_decoder_0"]
    np.testing.assert_array_equal(calls[0][1], TEXT)
    np.testing.assert_array_equal(calls[1][1], calls[0][2])
    assert np.abs(calls[1][1] - TEXT).max() > 0


PUBLISHED = {"unet", "text_projection", "text_encoder", "image_encoder", "refiner", "generator"}
BLOCKS = {"encoder_0", "encoder_1", "encoder_2", "decoder_1", "decoder_0", "up_1", "up_0", "head"}
FUSIONS = {f"fusion_{name}" for name in block_names(3)}
CYCLE, IAC, EMPTY = {"cycle_head"}, {"consistency_head"}, {"no_text_embedding"}
# method -> top-level names, parameters of the U-Net beside its blocks, parameters of a level
TREES = {
    "published": (PUBLISHED | CYCLE | IAC, set(), set()),
    "full": (PUBLISHED | CYCLE | IAC | EMPTY, FUSIONS, {"refiner", "modulation"}),
    "semi": (PUBLISHED | CYCLE | IAC | EMPTY, FUSIONS, {"refiner", "modulation"}),
    "unet": ({"unet"}, set(), set()),
    "ef_unet": ({"unet", "text_projection", "text_encoder", "generator"}, set(), set()),
    "one_way": (
        {"unet", "text_projection", "text_encoder", "generator"},
        FUSIONS,
        {"modulation"},
    ),
    "no_bmf": (
        PUBLISHED - {"image_encoder", "refiner"} | CYCLE | IAC | EMPTY,
        set(),
        set(),
    ),
    "no_iac": (PUBLISHED | CYCLE | EMPTY, FUSIONS, {"refiner", "modulation"}),
    "no_cycle": (PUBLISHED | IAC | EMPTY, FUSIONS, {"refiner", "modulation"}),
    "no_generator": (
        PUBLISHED - {"generator"} | IAC | EMPTY,
        FUSIONS,
        {"refiner", "modulation"},
    ),
}


def abstract_variables(model):
    ids = jnp.zeros((1, tiny.MAX_LENGTH), jnp.int32)
    image = jnp.zeros((1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3))
    return jax.eval_shape(model.init, jax.random.key(0), image, ids, ids == 0)


@pytest.mark.parametrize("method", TREES)
def test_disabled_parts_have_no_parameters(method):
    names, fused, level_names = TREES[method]
    params = abstract_variables(tiny.model(method=method))["params"]
    assert set(params) == names
    assert set(params["unet"]) == BLOCKS | fused
    assert all(set(params["unet"][name]) == level_names for name in fused)
    channels = params["unet"]["encoder_0"]["conv_0"]["kernel"].shape[2]
    assert channels == (6 if "generator" in names else 3)


def test_all_methods_are_covered():
    assert set(TREES) == set(variants.METHODS)


def test_image_only_unet_ignores_the_prompt():
    model = tiny.model(method="unet")
    image = jnp.asarray(RNG.random((2, 56, 56, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), image[:1])
    logits, aux = model.apply(variables, image)
    assert set(aux) == {"features"}
    with_prompt, _ = model.apply(variables, image, **biclip.text_inputs(tiny.batch(2)))
    np.testing.assert_array_equal(logits, with_prompt)


def test_empty_prompt_has_a_learned_vector():
    model = tiny.model(method="full")
    variables = tiny.noisy(tiny.init(model))
    batch = tiny.batch(2)
    image, prompt = biclip.to_unit_rgb(batch["image"]), biclip.text_inputs(batch)
    one_empty = {**prompt, "has_text": jnp.array([True, False])}
    fuse = jax.jit(lambda text: model.apply(variables, image, **text, method=model.fuse))
    expected, found = fuse(prompt), fuse(one_empty)
    np.testing.assert_array_equal(found.text[0], expected.text[0])
    np.testing.assert_array_equal(found.text[1], variables["params"]["no_text_embedding"])
    other_ids = jnp.stack([one_empty["text_ids"][0], one_empty["text_ids"][0]])
    other = fuse({**one_empty, "text_ids": other_ids})
    np.testing.assert_array_equal(found.refined_text, other.refined_text)
    without_flag = {name: value for name, value in prompt.items() if name != "has_text"}
    np.testing.assert_array_equal(fuse(without_flag).text, expected.text)


def test_group_norm_has_no_statistics_and_matches_numpy():
    block = DoubleConv(12, norm="group")  # gcd(8, 12) = 4 groups of 3
    x = jnp.asarray(RNG.standard_normal((2, 5, 6, 3)), jnp.float32)
    variables = block.init(jax.random.key(0), x, True)
    assert set(variables) == {"params"}
    shifted = jax.tree.map(lambda p: p + 0.1, variables)
    _, state = block.apply(shifted, x, True, capture_intermediates=True, mutable=["intermediates"])
    captured = state["intermediates"]
    maps = np.asarray(captured["conv_0"]["__call__"][0], np.float64).reshape(2, 30, 4, 3)
    variance = maps.var((1, 3), keepdims=True)
    maps = (maps - maps.mean((1, 3), keepdims=True)) / np.sqrt(variance + 1e-5)
    norm = shifted["params"]["norm_0"]
    expected = maps.reshape(2, 5, 6, 12) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(captured["norm_0"]["__call__"][0], expected, atol=1e-4)


@pytest.mark.parametrize(("method", "num_zero"), [("full", 6), ("published", 0)])
def test_zero_initialised_refiners_leave_the_text_unchanged(method, num_zero):
    model, batch = tiny.model(method=method), tiny.batch(2)
    prompt = biclip.text_inputs(batch)
    first = {name: rows[:1] for name, rows in prompt.items()}
    variables = biclip.init(model, jax.random.key(0), first)
    _, aux = model.apply(variables, biclip.to_unit_rgb(batch["image"]), **prompt)
    assert np.array_equal(aux["refined_text"], aux["text"]) == bool(num_zero)
    flat = flatten_dict(variables["params"], sep="/")
    kernels = [leaf for name, leaf in flat.items() if name.endswith("refiner/mlp/out/kernel")]
    assert sum(not np.any(leaf) for leaf in kernels) == num_zero


def test_config_without_level_fields_gives_the_published_model():
    old = tiny.model_config()
    assert not {"norm", "bmf", "pseudo_image", "image", "heads", "iac_blocks"} & set(old)
    model = biclip.build(old, vocab_size=tiny.VOCAB_SIZE)
    assert model == tiny.model(method="published").clone(level_hidden=256)
    tree = abstract_variables(model)
    assert set(tree["params"]) == PUBLISHED | CYCLE | IAC
    expected = abstract_variables(tiny.model(method="published"))
    assert jax.tree.map(lambda x: x.shape, tree) == jax.tree.map(lambda x: x.shape, expected)


def test_contrast_initialisation_keeps_the_variance_of_the_text_at_any_size():
    """The published initialisation shrinks the differences between texts by a factor per layer."""
    text = jnp.asarray(RNG.standard_normal((16, 784)), jnp.float32)

    def image_contrast(size, contrast):
        module = fusion.Generator(size, contrast)
        images, _ = module.init_with_output(jax.random.key(0), text)
        return float(images.std(axis=0).mean())

    preserved = [image_contrast(size, True) for size in (56, 112, 224)]
    published = [image_contrast(size, False) for size in (56, 112, 224)]
    assert min(preserved) > 0.1 and max(preserved) < 1.5 * min(preserved)
    assert all(larger > 3 * smaller for larger, smaller in itertools.pairwise(published))
    assert published[-1] < 0.01


@pytest.mark.parametrize("contrast", [False, True])
def test_config_sets_the_contrast_of_the_generator(contrast):
    assert tiny.model(pseudo_contrast=contrast).bind({}).generator.contrast is contrast
