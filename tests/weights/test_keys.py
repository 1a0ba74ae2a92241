"""Name tables: no array used twice, every parameter of the model covered, spot checks."""

import re
from itertools import pairwise

import jax.numpy as jnp
import pytest

from biclip_jax.models import bert, biclip, clip
from biclip_jax.weights import architectures, convert, keys

VIT = {
    "kind": "vit",
    "image_size": 16,
    "patch_size": 8,
    "width": 4,
    "num_layers": 3,
    "num_heads": 1,
    "mlp_width": 8,
    "embedding_size": 4,
}
RESNET = {
    "kind": "resnet",
    "image_size": 32,
    "width": 2,
    "stages": (2, 1, 1, 3),
    "num_heads": 1,
    "embedding_size": 4,
}
TEXT = {
    "vocab_size": 7,
    "max_length": 5,
    "width": 4,
    "num_layers": 2,
    "num_heads": 1,
    "mlp_width": 8,
    "embedding_size": 4,
}
BERT = {k: v for k, v in TEXT.items() if k != "embedding_size"}
NETWORK = {
    "image_size": 56,
    "width": 2,
    "num_levels": 3,
    "dtype": "float32",
    "text": {"encoder": "bert", "trainable": False, "pooling": "all_tokens", "max_length": 5},
}
IDS = jnp.zeros((1, 5), jnp.int32)


def clip_shapes(image):
    model, size = clip.build({"image": image, "text": TEXT}), image["image_size"]
    return architectures.shapes_of(model, jnp.zeros((1, size, size, 3)), IDS)


def bert_shapes(projection_size):
    model = bert.build(BERT | {"projection_size": projection_size})
    return architectures.shapes_of(model, IDS, IDS > 0)


def network_shapes():
    image, features = jnp.zeros((1, 56, 56, 3)), jnp.zeros((1, 4))
    return architectures.shapes_of(biclip.build(NETWORK), image, text_features=features)


# name: (table, shapes of the model, patterns of unused names)
TABLES = {
    "clip hf": (keys.clip(VIT, TEXT, "hf"), lambda: clip_shapes(VIT), keys.CLIP_UNUSED),
    "clip openai": (keys.clip(VIT, TEXT, "openai"), lambda: clip_shapes(VIT), keys.CLIP_UNUSED),
    "clip resnet": (
        keys.clip(RESNET, TEXT, "openai"),
        lambda: clip_shapes(RESNET),
        keys.CLIP_UNUSED,
    ),
    "bert": (
        keys.bert(BERT | {"projection_size": 0}, ""),
        lambda: bert_shapes(0),
        keys.BERT_UNUSED,
    ),
    "cxr_bert": (
        keys.bert(BERT | {"projection_size": 3}, "bert."),
        lambda: bert_shapes(3),
        keys.BERT_UNUSED,
    ),
    "biclip": (keys.biclip(3, 1), network_shapes, keys.BICLIP_UNUSED),
}
every_table = pytest.mark.parametrize("name", TABLES)


def sources(table):
    return [source for rule in table.values() for source in rule.sources]


@every_table
def test_names_are_exactly_those_of_the_model(name):
    table, shapes, _ = TABLES[name]
    assert sorted(table) == sorted(shapes())


@every_table
def test_no_source_is_used_twice_or_matches_an_unused_pattern(name):
    table, _, unused = TABLES[name]
    names = sources(table)
    assert len(names) == len(set(names))
    assert not [n for n in names if any(re.fullmatch(pattern, n) for pattern in unused)]


@every_table
def test_every_layout_is_known_and_fits_the_axes_of_the_parameter(name):
    table, shapes, _ = TABLES[name]
    axes = {"linear": 2, "patches": 2, "conv": 4, "conv_transpose": 4}
    for parameter, shape in shapes().items():
        layout = table[parameter].layout
        assert layout in convert.LAYOUTS
        assert len(shape) == axes.get(layout, len(shape))
        # Untransposed kernels are those that OpenAI multiplies from the right.
        if parameter.endswith("/kernel") and layout == "same":
            assert sources({parameter: table[parameter]}) in (["visual.proj"], ["text_projection"])


def test_expand_joins_the_names_of_row_and_layer():
    rows = (("linear", "a/qkv", ("x.q", "x.k")), ("batch_norm", "n", "bn"), ("param", "p", "p"))
    assert keys.expand(rows, "ours/", "their.") == {
        "params/ours/a/qkv/kernel": (("their.x.q.weight", "their.x.k.weight"), "linear"),
        "params/ours/a/qkv/bias": (("their.x.q.bias", "their.x.k.bias"), "same"),
        "params/ours/n/scale": (("their.bn.weight",), "same"),
        "params/ours/n/bias": (("their.bn.bias",), "same"),
        "batch_stats/ours/n/mean": (("their.bn.running_mean",), "same"),
        "batch_stats/ours/n/var": (("their.bn.running_var",), "same"),
        "params/ours/p": (("their.p",), "same"),
    }


def test_blocks_are_numbered_from_zero():
    table = keys.blocks([("table", "t", "e")], 3, "encoder/", "layers.{i}.")
    assert table == {
        f"params/encoder/blocks_{i}/t": keys.Rule((f"layers.{i}.e.weight",), "same")
        for i in range(3)
    }


@pytest.mark.parametrize(
    ("name", "parameter", "expected"),
    [
        (
            "clip hf",
            "params/image_encoder/blocks_2/attention/qkv/kernel",
            [f"vision_model.encoder.layers.2.self_attn.{x}_proj.weight" for x in "qkv"],
        ),
        (
            "clip hf",
            "params/text_encoder/words/embedding",
            ["text_model.embeddings.token_embedding.weight"],
        ),
        ("clip hf", "params/image_encoder/norm_pre/scale", ["vision_model.pre_layrnorm.weight"]),
        (
            "clip openai",
            "params/text_encoder/blocks_1/attention/qkv/bias",
            ["transformer.resblocks.1.attn.in_proj_bias"],
        ),
        (
            "clip openai",
            "params/image_encoder/blocks_0/mlp_out/kernel",
            ["visual.transformer.resblocks.0.mlp.c_proj.weight"],
        ),
        (
            "clip resnet",
            "batch_stats/image_encoder/stage_3_2/norm_2/var",
            ["visual.layer4.2.bn3.running_var"],
        ),
        (
            "clip resnet",
            "params/image_encoder/stage_0_0/conv_skip/kernel",
            ["visual.layer1.0.downsample.0.weight"],
        ),
        (
            "bert",
            "params/blocks_1/norm_1/scale",
            ["encoder.layer.1.output.LayerNorm.weight"],
        ),
        (
            "cxr_bert",
            "params/blocks_0/attention/qkv/kernel",
            [f"bert.encoder.layer.0.attention.self.{x}.weight" for x in ("query", "key", "value")],
        ),
        ("cxr_bert", "params/projection/out/bias", ["cls_projection_head.dense_to_output.bias"]),
        ("biclip", "params/unet/up_1/kernel", ["up1.up.weight"]),
        ("biclip", "params/unet/decoder_0/conv_1/kernel", ["up2.conv.double_conv.3.weight"]),
        (
            "biclip",
            "batch_stats/unet/encoder_2/norm_0/mean",
            ["down2.maxpool_conv.1.double_conv.1.running_mean"],
        ),
        ("biclip", "params/text_projection/out/kernel", ["text_encoder.project_head.3.weight"]),
    ],
)
def test_names_are_those_of_the_published_files(name, parameter, expected):
    assert list(TABLES[name][0][parameter].sources) == expected


def test_published_depth_has_four_upsamplings_and_three_doublings():
    table = keys.biclip(5, 3)
    assert table["params/unet/up_0/kernel"].sources == ("up4.up.weight",)
    assert table["params/generator/up_2/kernel"].sources == ("generator.4.weight",)
    depths = [table[f"params/unet/up_{i}/bias"].sources[0] for i in range(4)]
    assert all(a > b for a, b in pairwise(depths))


def test_unused_patterns_match_names_of_published_files():
    known = {
        keys.CLIP_UNUSED: ("text_model.embeddings.position_ids", "visual.bn1.num_batches_tracked"),
        keys.BERT_UNUSED: ("bert.pooler.dense.weight", "cls.predictions.decoder.bias"),
        keys.BICLIP_UNUSED: ("inc.double_conv.1.num_batches_tracked",),
    }
    for patterns, names in known.items():
        for name in names:
            assert any(re.fullmatch(pattern, name) for pattern in patterns), name
        assert not any(re.fullmatch(pattern, "cls_projection_head.x") for pattern in patterns)
