"""Architectures detected from shapes and config.json, and errors for invalid checkpoints."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from biclip_jax.convert import read_hf_config
from biclip_jax.core.errors import UserError
from biclip_jax.weights import architectures, readers
from biclip_jax.weights.formats.tensor import Tensor

ENCODERS = Path(__file__).parent.parent / "fixtures/encoders"


@cache
def open_fixture(name):
    """Returns (checkpoint, config.json) of a fixture."""
    file = {"openai_vit": "ViT.pt", "openai_resnet": "RN.pt"}.get(name, "")
    return readers.open_checkpoint(ENCODERS / name / file), read_hf_config(ENCODERS / name, None)


def with_tensors(name, change):
    checkpoint, _ = open_fixture(name)
    return checkpoint._replace(tensors=change(dict(checkpoint.tensors)))


def without(*patterns):
    def change(tensors):
        return {k: v for k, v in tensors.items() if not any(re.match(p, k) for p in patterns)}

    return change


def test_config_of_a_hugging_face_clip():
    config = architectures.convert_clip(*open_fixture("hf_clip")).config
    assert config == {
        "image": {
            "kind": "vit",
            "image_size": 32,
            "patch_size": 8,
            "width": 16,
            "num_layers": 2,
            "num_heads": 2,
            "mlp_width": 32,
            "embedding_size": 8,
            "activation": "quick_gelu",
            "epsilon": 1e-5,
        },
        "text": {
            "vocab_size": 520,
            "max_length": 10,
            "width": 12,
            "num_layers": 3,
            "num_heads": 3,
            "mlp_width": 20,
            "embedding_size": 8,
            "activation": "gelu",
            "epsilon": 1e-5,
        },
    }


def test_config_of_a_bert():
    checkpoint, hf_config = open_fixture("cxr_bert")
    config = architectures.convert_bert(checkpoint, hf_config | {"layer_norm_eps": 1e-6}).config
    assert config == {
        "vocab_size": 16,
        "max_length": 14,
        "num_segments": 2,
        "width": 12,
        "num_layers": 3,
        "num_heads": 2,
        "mlp_width": 24,
        "projection_size": 6,
        "activation": "gelu",
        "epsilon": 1e-6,
    }
    assert architectures.convert_bert(*open_fixture("bert_flax")).config["projection_size"] == 0


HEADS = {"vision_config": {"num_attention_heads": 1}, "text_config": {"num_attention_heads": 2}}


@pytest.mark.parametrize("name", ["hf_clip", "openai_vit"])
def test_heads_come_from_the_config_and_the_activation_defaults_to_openais(name):
    config = architectures.convert_clip(open_fixture(name)[0], HEADS).config
    assert (config["image"]["num_heads"], config["text"]["num_heads"]) == (1, 2)
    for encoder in ("image", "text"):
        assert (config[encoder]["activation"], config[encoder]["epsilon"]) == ("quick_gelu", 1e-5)


@pytest.mark.parametrize("name", ["hf_clip", "openai_vit"])
def test_activation_and_epsilon_of_each_encoder_are_read(name):
    hf_config = {
        "vision_config": {"num_attention_heads": 1, "layer_norm_eps": 1e-3, "hidden_act": "gelu"},
        "text_config": {"num_attention_heads": 2, "layer_norm_eps": 1e-4},
    }
    config = architectures.convert_clip(open_fixture(name)[0], hf_config).config
    assert (config["image"]["activation"], config["image"]["epsilon"]) == ("gelu", 1e-3)
    assert (config["text"]["activation"], config["text"]["epsilon"]) == ("quick_gelu", 1e-4)


@pytest.mark.parametrize("name", ["hf_clip", "openai_vit", "openai_resnet"])
@pytest.mark.parametrize("hf_config", [None, {}, {"text_config": None}])
def test_heads_of_an_unknown_width_are_not_guessed(name, hf_config):
    with pytest.raises(
        UserError, match=r"num_attention_heads is None for a width of .*config\.json"
    ):
        architectures.convert_clip(open_fixture(name)[0], hf_config)


def widened(width):
    """Returns the CXR-BERT of width 12 at another width, all zeros."""

    def change(tensors):
        shapes = {k: tuple(width if n == 12 else n for n in v.shape) for k, v in tensors.items()}
        return {
            k: Tensor(shape, np.dtype("float32"), lambda shape=shape: np.zeros(shape, np.float32))
            for k, shape in shapes.items()
        }

    return with_tensors("cxr_bert", change)


@pytest.mark.parametrize(("width", "heads"), [(512, 8), (640, 10), (768, 12), (1024, 16)])
def test_head_size_is_64_for_known_widths(width, heads):
    assert architectures.convert_bert(widened(width)).config["num_heads"] == heads


def test_other_widths_require_the_number_of_heads():
    with pytest.raises(UserError, match="num_attention_heads is None for a width of 384"):
        architectures.convert_bert(widened(384))
    converted = architectures.convert_bert(widened(384), {"num_attention_heads": 12})
    assert converted.config["num_heads"] == 12


def test_config_of_a_resnet():
    image = architectures.convert_clip(*open_fixture("openai_resnet")).config["image"]
    assert image == {
        "kind": "resnet",
        "image_size": 64,
        "width": 4,
        "stages": [1, 2, 1, 1],
        "num_heads": 2,
        "embedding_size": 8,
    }


def test_rejects_checkpoints_of_another_kind():
    with pytest.raises(UserError, match=r"no BERT: its arrays are logit_scale"):
        architectures.convert_bert(open_fixture("hf_clip")[0])
    with pytest.raises(UserError, match=r"no CLIP: its arrays are bert\.embeddings"):
        architectures.convert_clip(open_fixture("cxr_bert")[0])
    with pytest.raises(UserError, match="no published BiCLIP: its arrays are bert"):
        architectures.convert_biclip(open_fixture("cxr_bert")[0])


@pytest.mark.parametrize(
    ("kind", "name", "hf_config", "message"),
    [
        ("bert", "cxr_bert", {"hidden_act": "relu"}, "hidden_act 'relu'; expected gelu, quick_"),
        (
            "bert",
            "cxr_bert",
            {"hidden_act": ["gelu"]},
            "hidden_act .*gelu.*; expected gelu, quick_",
        ),
        ("bert", "cxr_bert", {"hidden_act": None}, "hidden_act 'None'"),
        ("clip", "hf_clip", {"vision_config": {"hidden_act": "silu"}}, "hidden_act 'silu'"),
        ("clip", "hf_clip", {"text_config": {"hidden_act": "gelu_new"}}, "hidden_act 'gelu_new'"),
        ("clip", "openai_vit", {"vision_config": {"hidden_act": "relu"}}, "hidden_act 'relu'"),
        ("clip", "openai_resnet", {"text_config": {"hidden_act": {}}}, "hidden_act"),
        ("clip", "hf_clip", {"vision_config": {"layer_norm_eps": "1e-5"}}, "layer_norm_eps 1e-5"),
        ("clip", "openai_vit", {"text_config": {"layer_norm_eps": 0.0}}, "layer_norm_eps 0.0"),
        ("bert", "cxr_bert", {"layer_norm_eps": -1e-5}, "layer_norm_eps -1e-05"),
        ("bert", "cxr_bert", {"layer_norm_eps": float("nan")}, "layer_norm_eps nan"),
        ("bert", "cxr_bert", {"layer_norm_eps": 1}, "layer_norm_eps 1; expected a small"),
        ("bert", "cxr_bert", {"position_embedding_type": "relative_key"}, "type relative_key"),
    ],
)
def test_rejects_unsupported_config_values(kind, name, hf_config, message):
    # Fields that the case does not change are kept: without heads the error would be another.
    checkpoint, base_config = open_fixture(name)
    changed = {
        key: base_config[key] | value if key.endswith("_config") else value
        for key, value in hf_config.items()
    }
    with pytest.raises(UserError, match=message):
        getattr(architectures, f"convert_{kind}")(checkpoint, base_config | changed)


@pytest.mark.parametrize("name", ["hf_clip", "openai_vit"])
@pytest.mark.parametrize("part", ["vision_config", "text_config"])
@pytest.mark.parametrize("value", [["num_attention_heads"], "x", 3])
def test_rejects_an_encoder_config_that_is_not_an_object(name, part, value):
    checkpoint, hf_config = open_fixture(name)
    with pytest.raises(
        UserError, match=r"vision_config or text_config of config\.json is not an object"
    ):
        architectures.convert_clip(checkpoint, hf_config | {part: value})


@pytest.mark.parametrize(
    ("kind", "name", "hf_config"),
    [
        ("bert", "cxr_bert", {"num_attention_heads": 5}),
        ("bert", "cxr_bert", {"num_attention_heads": 0}),
        ("bert", "cxr_bert", {"num_attention_heads": -2}),
        ("bert", "cxr_bert", {"num_attention_heads": 2.0}),
        ("bert", "cxr_bert", {"num_attention_heads": "2"}),
        ("bert", "cxr_bert", {"num_attention_heads": True}),
        ("bert", "cxr_bert", {"num_attention_heads": [2]}),
        ("clip", "hf_clip", {"vision_config": {"num_attention_heads": 3}}),
        ("clip", "openai_vit", {"vision_config": {"num_attention_heads": 3}}),
        ("clip", "openai_resnet", {"text_config": {"num_attention_heads": 7}}),
    ],
)
def test_rejects_heads_that_do_not_divide_the_width(kind, name, hf_config):
    convert = getattr(architectures, f"convert_{kind}")
    with pytest.raises(UserError, match="num_attention_heads"):
        convert(open_fixture(name)[0], hf_config)


@pytest.mark.parametrize(
    ("kind", "name", "removed", "message"),
    [
        ("bert", "cxr_bert", r"bert\.encoder\.layer\.2\.output", r"layer\.2\.output\.LayerNorm"),
        ("bert", "cxr_bert", r"bert\.encoder\.layer\.0\.inter", r"layer\.0\.intermediate\.dense"),
        ("bert", "cxr_bert", r"bert\.encoder\.layer\.1\.", r"layer\.1\..* and 11 more are missing"),
        ("bert", "cxr_bert", r"bert\.encoder\.", r"layer\.0\.intermediate.* is missing"),
        ("bert", "cxr_bert", r"cls_projection_head\.Lay", r"cls_projection_head\.LayerNorm\.bias"),
        ("clip", "hf_clip", r"vision_model\.encoder\.layers\.1\.mlp\.fc2", r"layers\.1\.mlp\.fc2"),
        ("clip", "hf_clip", r"text_projection", r"text_projection\.weight is missing"),
        ("clip", "hf_clip", r"logit_scale", r"logit_scale is missing"),
        ("clip", "openai_vit", r"visual\.proj", r"visual\.proj is missing"),
        ("clip", "openai_vit", r"transformer\.resblocks\.1\.ln_2", r"resblocks\.1\.ln_2\.bias"),
        ("clip", "openai_resnet", r"visual\.layer2\.1\.bn3", r"layer2\.1\.bn3\.running_mean"),
        ("clip", "openai_resnet", r"visual\.layer1", r"visual\.layer1\.0\.conv1\.weight is mis"),
    ],
)
def test_error_names_missing_arrays(kind, name, removed, message):
    convert = getattr(architectures, f"convert_{kind}")
    with pytest.raises(UserError, match=message):
        convert(with_tensors(name, without(removed)), open_fixture(name)[1])


@pytest.mark.parametrize(
    ("kind", "name", "array", "shape"),
    [
        ("clip", "hf_clip", "vision_model.embeddings.position_embedding.weight", (18, 16)),
        ("clip", "hf_clip", "vision_model.embeddings.patch_embedding.weight", (16, 3, 8, 7)),
        ("clip", "hf_clip", "visual_projection.weight", (8,)),
        ("clip", "hf_clip", "vision_model.embeddings.position_embedding.weight", (1, 16)),
        ("clip", "hf_clip", "text_projection.weight", (8, 13)),
        ("clip", "openai_vit", "visual.positional_embedding", (6, 16)),
        ("clip", "openai_resnet", "visual.attnpool.positional_embedding", (4, 128)),
        ("clip", "openai_resnet", "visual.conv1.weight", (2, 4, 3, 3)),
        ("bert", "cxr_bert", "bert.embeddings.word_embeddings.weight", (16, 12, 1)),
        ("bert", "cxr_bert", "bert.embeddings.LayerNorm.weight", (13,)),
    ],
)
def test_error_names_an_array_of_the_wrong_shape(kind, name, array, shape):
    def change(tensors):
        return tensors | {array: Tensor(shape, np.dtype("float32"), lambda: np.zeros(shape))}

    convert = getattr(architectures, f"convert_{kind}")
    with pytest.raises(UserError, match=re.escape(array)):
        convert(with_tensors(name, change), open_fixture(name)[1])


@pytest.mark.parametrize(
    ("name", "array", "shape", "sizes"),
    [
        ("hf_clip", "text_projection.weight", (9, 12), "8 outputs, text_projection 9"),
        ("hf_clip", "visual_projection.weight", (7, 16), "7 outputs, text_projection 8"),
        ("openai_vit", "text_projection", None, "8 outputs, text_projection 9"),
        ("openai_resnet", "text_projection", None, "8 outputs, text_projection 9"),
    ],
)
def test_rejects_embeddings_of_different_sizes(name, array, shape, sizes):
    def change(tensors):
        new_shape = shape or (tensors[array].shape[0], 9)
        return tensors | {
            array: Tensor(new_shape, np.dtype("float32"), lambda: np.zeros(new_shape))
        }

    with pytest.raises(UserError, match=sizes):
        architectures.convert_clip(with_tensors(name, change), open_fixture(name)[1])


def assert_same(first, second):
    assert first.config == second.config
    assert first.variables.keys() == second.variables.keys()
    for name, array in first.variables.items():
        np.testing.assert_array_equal(array, second.variables[name])


def test_text_prefix_of_open_clip_is_dropped():
    unprefixed = ("visual.", "logit_scale", "input_resolution", "context_length", "vocab_size")

    def prefixed(tensors):
        return {k if k.startswith(unprefixed) else f"text.{k}": v for k, v in tensors.items()}

    renamed = with_tensors("openai_vit", prefixed)
    assert "text.transformer.resblocks.0.ln_1.weight" in renamed.tensors
    expected = architectures.convert_clip(*open_fixture("openai_vit"))
    assert_same(architectures.convert_clip(renamed, open_fixture("openai_vit")[1]), expected)


def test_a_bert_without_its_prefix_gives_the_same_model():
    def without_prefix(tensors):
        return {k.removeprefix("bert."): v for k, v in tensors.items()}

    converted = architectures.convert_bert(
        with_tensors("cxr_bert", without_prefix), open_fixture("cxr_bert")[1]
    )
    assert_same(converted, architectures.convert_bert(*open_fixture("cxr_bert")))


def test_result_is_float32_and_the_checkpoint_is_unchanged():
    checkpoint, hf_config = open_fixture("hf_clip")
    count = len(checkpoint.tensors)
    converted = architectures.convert_clip(checkpoint, hf_config)
    assert {array.dtype for array in converted.variables.values()} == {np.dtype("float32")}
    assert len(checkpoint.tensors) == count
