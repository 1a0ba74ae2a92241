"""What a checkpoint is said to be, from its shapes and its config.json, and refusals."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from biclip_jax.convert import read_hf_config
from biclip_jax.core.errors import UserError
from biclip_jax.weights import architectures, readers
from biclip_jax.weights.formats.tensor import Tensor

TOWERS = Path(__file__).parent.parent / "fixtures/encoders"


@cache
def opened(name):
    """(checkpoint, config.json) of a fixture."""
    file = {"openai_vit": "ViT.pt", "openai_resnet": "RN.pt"}.get(name, "")
    return readers.open_checkpoint(TOWERS / name / file), read_hf_config(TOWERS / name, None)


def with_tensors(name, change):
    checkpoint, _ = opened(name)
    return checkpoint._replace(tensors=change(dict(checkpoint.tensors)))


def without(*patterns):
    def change(tensors):
        return {k: v for k, v in tensors.items() if not any(re.match(p, k) for p in patterns)}

    return change


def test_a_clip_of_hugging_face_is_described_by_shapes_and_config():
    config = architectures.convert_clip(*opened("hf_clip")).config
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


def test_a_bert_is_described_by_shapes_and_config():
    checkpoint, hf_config = opened("cxr_bert")
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
    assert architectures.convert_bert(*opened("bert_flax")).config["projection_size"] == 0


HEADS = {"vision_config": {"num_attention_heads": 1}, "text_config": {"num_attention_heads": 2}}


@pytest.mark.parametrize("name", ["hf_clip", "openai_vit"])
def test_heads_are_those_of_the_config_and_the_activation_openai_s(name):
    config = architectures.convert_clip(opened(name)[0], HEADS).config
    assert (config["image"]["num_heads"], config["text"]["num_heads"]) == (1, 2)
    for encoder in ("image", "text"):
        assert (config[encoder]["activation"], config[encoder]["epsilon"]) == ("quick_gelu", 1e-5)


@pytest.mark.parametrize("name", ["hf_clip", "openai_vit"])
def test_activation_and_epsilon_of_each_tower_are_read(name):
    hf_config = {
        "vision_config": {"num_attention_heads": 1, "layer_norm_eps": 1e-3, "hidden_act": "gelu"},
        "text_config": {"num_attention_heads": 2, "layer_norm_eps": 1e-4},
    }
    config = architectures.convert_clip(opened(name)[0], hf_config).config
    assert (config["image"]["activation"], config["image"]["epsilon"]) == ("gelu", 1e-3)
    assert (config["text"]["activation"], config["text"]["epsilon"]) == ("quick_gelu", 1e-4)


@pytest.mark.parametrize("name", ["hf_clip", "openai_vit", "openai_resnet"])
@pytest.mark.parametrize("hf_config", [None, {}, {"text_config": None}])
def test_heads_of_an_unknown_width_are_not_guessed(name, hf_config):
    with pytest.raises(
        UserError, match=r"num_attention_heads is None for a width of .*config\.json"
    ):
        architectures.convert_clip(opened(name)[0], hf_config)


def widened(width):
    """The CXR-BERT of width 12 at another width, all zeros."""

    def change(tensors):
        shapes = {k: tuple(width if n == 12 else n for n in v.shape) for k, v in tensors.items()}
        return {
            k: Tensor(shape, np.dtype("float32"), lambda shape=shape: np.zeros(shape, np.float32))
            for k, shape in shapes.items()
        }

    return with_tensors("cxr_bert", change)


@pytest.mark.parametrize(("width", "heads"), [(512, 8), (640, 10), (768, 12), (1024, 16)])
def test_of_a_known_width_a_head_is_64_wide(width, heads):
    assert architectures.convert_bert(widened(width)).config["num_heads"] == heads


def test_of_another_width_it_is_asked_for():
    with pytest.raises(UserError, match="num_attention_heads is None for a width of 384"):
        architectures.convert_bert(widened(384))
    found = architectures.convert_bert(widened(384), {"num_attention_heads": 12})
    assert found.config["num_heads"] == 12


def test_a_resnet_is_described_by_its_shapes():
    image = architectures.convert_clip(*opened("openai_resnet")).config["image"]
    assert image == {
        "kind": "resnet",
        "image_size": 64,
        "width": 4,
        "stages": [1, 2, 1, 1],
        "num_heads": 2,
        "embedding_size": 8,
    }


def test_the_kinds_are_not_taken_for_one_another():
    with pytest.raises(UserError, match=r"no BERT: its arrays are logit_scale"):
        architectures.convert_bert(opened("hf_clip")[0])
    with pytest.raises(UserError, match=r"no CLIP: its arrays are bert\.embeddings"):
        architectures.convert_clip(opened("cxr_bert")[0])
    with pytest.raises(UserError, match="no published BiCLIP: its arrays are bert"):
        architectures.convert_biclip(opened("cxr_bert")[0])


@pytest.mark.parametrize(
    ("kind", "name", "hf_config", "said"),
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
def test_what_is_not_built_is_refused(kind, name, hf_config, said):
    # What the case does not change stays as it is, or the heads would be missed first.
    checkpoint, own = opened(name)
    changed = {
        key: own[key] | value if key.endswith("_config") else value
        for key, value in hf_config.items()
    }
    with pytest.raises(UserError, match=said):
        getattr(architectures, f"convert_{kind}")(checkpoint, own | changed)


@pytest.mark.parametrize("name", ["hf_clip", "openai_vit"])
@pytest.mark.parametrize("part", ["vision_config", "text_config"])
@pytest.mark.parametrize("value", [["num_attention_heads"], "x", 3])
def test_a_part_of_the_config_that_is_no_object_is_refused(name, part, value):
    checkpoint, own = opened(name)
    with pytest.raises(
        UserError, match=r"vision_config or text_config of config\.json is no object"
    ):
        architectures.convert_clip(checkpoint, own | {part: value})


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
def test_heads_that_do_not_divide_the_width_are_refused(kind, name, hf_config):
    convert = getattr(architectures, f"convert_{kind}")
    with pytest.raises(UserError, match="num_attention_heads"):
        convert(opened(name)[0], hf_config)


@pytest.mark.parametrize(
    ("kind", "name", "lost", "said"),
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
def test_a_file_that_was_cut_names_what_it_lacks(kind, name, lost, said):
    convert = getattr(architectures, f"convert_{kind}")
    with pytest.raises(UserError, match=said):
        convert(with_tensors(name, without(lost)), opened(name)[1])


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
def test_an_array_of_another_shape_is_named(kind, name, array, shape):
    def change(tensors):
        return tensors | {array: Tensor(shape, np.dtype("float32"), lambda: np.zeros(shape))}

    convert = getattr(architectures, f"convert_{kind}")
    with pytest.raises(UserError, match=re.escape(array)):
        convert(with_tensors(name, change), opened(name)[1])


@pytest.mark.parametrize(
    ("name", "array", "shape", "sizes"),
    [
        ("hf_clip", "text_projection.weight", (9, 12), "8 numbers, text_projection 9"),
        ("hf_clip", "visual_projection.weight", (7, 16), "7 numbers, text_projection 8"),
        ("openai_vit", "text_projection", None, "8 numbers, text_projection 9"),
        ("openai_resnet", "text_projection", None, "8 numbers, text_projection 9"),
    ],
)
def test_embeddings_of_two_sizes_are_refused(name, array, shape, sizes):
    def change(tensors):
        found = shape or (tensors[array].shape[0], 9)
        return tensors | {array: Tensor(found, np.dtype("float32"), lambda: np.zeros(found))}

    with pytest.raises(UserError, match=sizes):
        architectures.convert_clip(with_tensors(name, change), opened(name)[1])


def same(first, second):
    assert first.config == second.config
    assert first.variables.keys() == second.variables.keys()
    for name, array in first.variables.items():
        np.testing.assert_array_equal(array, second.variables[name])


def test_the_text_prefix_of_open_clip_is_dropped():
    own = ("visual.", "logit_scale", "input_resolution", "context_length", "vocab_size")

    def prefixed(tensors):
        return {k if k.startswith(own) else f"text.{k}": v for k, v in tensors.items()}

    renamed = with_tensors("openai_vit", prefixed)
    assert "text.transformer.resblocks.0.ln_1.weight" in renamed.tensors
    expected = architectures.convert_clip(*opened("openai_vit"))
    same(architectures.convert_clip(renamed, opened("openai_vit")[1]), expected)


def test_a_bert_without_its_prefix_is_the_same_bert():
    def bare(tensors):
        return {k.removeprefix("bert."): v for k, v in tensors.items()}

    found = architectures.convert_bert(with_tensors("cxr_bert", bare), opened("cxr_bert")[1])
    same(found, architectures.convert_bert(*opened("cxr_bert")))


def test_what_is_returned_is_float32_and_the_checkpoint_stays_whole():
    checkpoint, hf_config = opened("hf_clip")
    count = len(checkpoint.tensors)
    converted = architectures.convert_clip(checkpoint, hf_config)
    assert {array.dtype for array in converted.variables.values()} == {np.dtype("float32")}
    assert len(checkpoint.tensors) == count
