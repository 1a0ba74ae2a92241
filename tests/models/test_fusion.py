"""Fusion at the U-Net's levels: zero at first, the formula by hand, each direction off."""

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


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("forth", [True, False])
def test_a_level_is_the_formula_by_hand(forth, back):
    """t' = t + g([t; mean F]); F' = F (1 + gamma(t')) + beta(t'); what is off changes nothing."""
    module = fusion.LevelFusion(vision_to_text=forth, text_to_vision=back, hidden=5)
    shapes = jax.eval_shape(module.init, jax.random.key(0), FEATURES, TEXT)
    names = {name for name, on in (("refiner", forth), ("modulation", back)) if on}
    assert set(shapes.get("params", {})) == names
    params = random_params(module, FEATURES, TEXT) if names else {}
    features, text = (np.asarray(x, np.float64) for x in (FEATURES, TEXT))
    if forth:
        both = np.concatenate([text, features.mean((1, 2))], axis=-1)
        text = text + mlp_by_hand(params["refiner"]["mlp"], both)
    if back:
        kernel, bias = params["modulation"]["kernel"], params["modulation"]["bias"]
        gamma, beta = np.split((text @ kernel + bias)[:, None, None], 2, axis=-1)
        features = features * (1 + gamma) + beta
    with jax.default_matmul_precision("highest"):
        found, refined = module.apply({"params": params}, FEATURES, TEXT)
    np.testing.assert_allclose(found, features, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(refined, text, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_training_begins_at_the_plain_u_net_to_the_bit(norm):
    fused = UNet((2, 4, 8), norm=norm, fused_blocks=block_names(3), fusion_hidden=5)
    plain = fused.clone(fused_blocks=())
    x = jnp.asarray(RNG.standard_normal((2, 8, 8, 6)), jnp.float32)
    variables = jax.jit(fused.init, static_argnums=2)(jax.random.key(0), x, False, TEXT)
    without = {
        **variables,
        "params": {k: v for k, v in variables["params"].items() if not k.startswith("fusion_")},
    }
    assert len(variables["params"]) == len(without["params"]) + 5
    expected, features = plain.apply(without, x, False)
    found, same = fused.apply(variables, x, False, TEXT)
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, same, features)
    moved = tiny.noisy({"batch_stats": {}, **variables})
    one, other = (fused.apply(moved, x, False, text)[0] for text in (TEXT, -TEXT))
    assert np.abs(one - other).max() > 1e-4


@pytest.mark.slow
def test_full_begins_at_the_same_network_without_levels_to_the_bit():
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


def test_the_sentence_goes_through_the_levels_in_the_order_of_the_data():
    """Each level's refiner sees the sentence that the one before left."""
    seen = []
    module = UNet((2, 4), fused_blocks=("encoder_1", "decoder_0"), fusion_hidden=5)
    x = jnp.asarray(RNG.standard_normal((2, 8, 8, 3)), jnp.float32)
    variables = module.init(jax.random.key(0), x, False, TEXT)

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, fusion.LevelFusion):
            seen.append((context.module.name, args[1], out[1]))
        return out

    with nn.intercept_methods(watch):
        module.apply(variables, x, False, TEXT)
    assert [name for name, *_ in seen] == ["fusion_encoder_1", "fusion_decoder_0"]
    np.testing.assert_array_equal(seen[0][1], TEXT)
    np.testing.assert_array_equal(seen[1][1], seen[0][2])
    assert np.abs(seen[1][1] - TEXT).max() > 0


PUBLISHED = {"unet", "text_projection", "text_encoder", "image_encoder", "refiner", "generator"}
BLOCKS = {"encoder_0", "encoder_1", "encoder_2", "decoder_1", "decoder_0", "up_1", "up_0", "head"}
FUSIONS = {f"fusion_{name}" for name in block_names(3)}
CYCLE, IAC, EMPTY = {"cycle_head"}, {"consistency_head"}, {"no_text_embedding"}
# method -> top-level names, what the U-Net holds beside its blocks, what a level holds
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


def tree_of(model):
    ids = jnp.zeros((1, tiny.MAX_LENGTH), jnp.int32)
    image = jnp.zeros((1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3))
    return jax.eval_shape(model.init, jax.random.key(0), image, ids, ids == 0)


@pytest.mark.parametrize("method", TREES)
def test_what_is_off_has_no_parameters(method):
    names, fused, inside = TREES[method]
    params = tree_of(tiny.model(method=method))["params"]
    assert set(params) == names
    assert set(params["unet"]) == BLOCKS | fused
    assert all(set(params["unet"][name]) == inside for name in fused)
    channels = params["unet"]["encoder_0"]["conv_0"]["kernel"].shape[2]
    assert channels == (6 if "generator" in names else 3)


def test_all_methods_are_looked_at():
    assert set(TREES) == set(variants.METHODS)


def test_the_image_only_u_net_needs_no_sentence_and_ignores_one():
    model = tiny.model(method="unet")
    image = jnp.asarray(RNG.random((2, 56, 56, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), image[:1])
    logits, aux = model.apply(variables, image)
    assert set(aux) == {"features"}
    again, _ = model.apply(variables, image, **biclip.text_inputs(tiny.batch(2)))
    np.testing.assert_array_equal(logits, again)


def test_an_empty_sentence_has_a_learned_vector_of_its_own():
    model = tiny.model(method="full")
    variables = tiny.noisy(tiny.init(model))
    batch = tiny.batch(2)
    image, prompt = biclip.to_unit_rgb(batch["image"]), biclip.text_inputs(batch)
    half = {**prompt, "has_text": jnp.array([True, False])}
    fuse = jax.jit(lambda text: model.apply(variables, image, **text, method=model.fuse))
    whole, found = fuse(prompt), fuse(half)
    np.testing.assert_array_equal(found.text[0], whole.text[0])
    np.testing.assert_array_equal(found.text[1], variables["params"]["no_text_embedding"])
    other = fuse({**half, "text_ids": jnp.stack([half["text_ids"][0], half["text_ids"][0]])})
    np.testing.assert_array_equal(found.refined_text, other.refined_text)
    unmarked = {name: value for name, value in prompt.items() if name != "has_text"}
    np.testing.assert_array_equal(fuse(unmarked).text, whole.text)


def test_group_norm_keeps_no_statistics_and_is_the_formula():
    block = DoubleConv(12, norm="group")  # gcd(8, 12) = 4 groups of 3
    x = jnp.asarray(RNG.standard_normal((2, 5, 6, 3)), jnp.float32)
    variables = block.init(jax.random.key(0), x, True)
    assert set(variables) == {"params"}
    moved = jax.tree.map(lambda p: p + 0.1, variables)
    _, state = block.apply(moved, x, True, capture_intermediates=True, mutable=["intermediates"])
    seen = state["intermediates"]
    maps = np.asarray(seen["conv_0"]["__call__"][0], np.float64).reshape(2, 30, 4, 3)
    variance = maps.var((1, 3), keepdims=True)
    maps = (maps - maps.mean((1, 3), keepdims=True)) / np.sqrt(variance + 1e-5)
    norm = moved["params"]["norm_0"]
    expected = maps.reshape(2, 5, 6, 12) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(seen["norm_0"]["__call__"][0], expected, atol=1e-4)


@pytest.mark.parametrize(("method", "refiners"), [("full", 6), ("published", 0)])
def test_refiners_that_begin_at_zero_let_the_sentence_pass(method, refiners):
    model, batch = tiny.model(method=method), tiny.batch(2)
    prompt = biclip.text_inputs(batch)
    one = {name: rows[:1] for name, rows in prompt.items()}
    variables = biclip.init(model, jax.random.key(0), one)
    _, named = model.apply(variables, biclip.to_unit_rgb(batch["image"]), **prompt)
    assert np.array_equal(named["refined_text"], named["text"]) == bool(refiners)
    flat = flatten_dict(variables["params"], sep="/")
    outputs = [leaf for name, leaf in flat.items() if name.endswith("refiner/mlp/out/kernel")]
    assert sum(not np.any(leaf) for leaf in outputs) == refiners


def test_configurations_from_before_the_levels_give_the_published_model():
    old = tiny.model_config()
    assert not {"norm", "bmf", "pseudo_image", "image", "heads", "iac_blocks"} & set(old)
    model = biclip.build(old, vocab_size=tiny.VOCAB_SIZE)
    assert model == tiny.model(method="published").clone(level_hidden=256)
    tree = tree_of(model)
    assert set(tree["params"]) == PUBLISHED | CYCLE | IAC
    same = tree_of(tiny.model(method="published"))
    assert jax.tree.map(lambda x: x.shape, tree) == jax.tree.map(lambda x: x.shape, same)


def test_the_pseudo_image_begins_with_the_sentence_s_contrast_at_any_size():
    """What differs between sentences, which the published first values lose by a factor a layer."""
    prompts = jnp.asarray(RNG.standard_normal((16, 784)), jnp.float32)

    def contrast(size, begins):
        module = fusion.Generator(size, begins)
        images, _ = module.init_with_output(jax.random.key(0), prompts)
        return float(images.std(axis=0).mean())

    kept = [contrast(size, True) for size in (56, 112, 224)]
    lost = [contrast(size, False) for size in (56, 112, 224)]
    assert min(kept) > 0.1 and max(kept) < 1.5 * min(kept)
    assert all(large > 3 * small for large, small in itertools.pairwise(lost))
    assert lost[-1] < 0.01


@pytest.mark.parametrize("begins", [False, True])
def test_a_configuration_says_how_the_generator_begins(begins):
    assert tiny.model(pseudo_contrast=begins).bind({}).generator.contrast is begins
