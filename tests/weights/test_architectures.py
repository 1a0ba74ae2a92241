"""What a checkpoint is said to be, from its shapes and its config.json, and refusals."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from biclip_jax.convert import read_hf_config
from biclip_jax.errors import UserError
from biclip_jax.weights import architectures, readers
from biclip_jax.weights.readers import Tensor

TOWERS = Path(__file__).parent.parent / "fixtures/towers"


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


def test_without_a_config_a_head_is_64_wide_and_the_activation_openai_s():
    config = architectures.convert_clip(opened("hf_clip")[0]).config
    assert (config["image"]["num_heads"], config["text"]["num_heads"]) == (1, 1)
    assert config["text"]["activation"] == "quick_gelu"
    image = architectures.convert_clip(opened("openai_resnet")[0]).config["image"]
    assert image == {
        "kind": "resnet",
        "image_size": 64,
        "width": 4,
        "stages": [1, 2, 1, 1],
        "num_heads": 2,
        "embedding_size": 8,
    }


def test_the_kinds_are_not_taken_for_one_another():
    with pytest.raises(UserError, match=r"embeddings\.word_embeddings\.weight is missing"):
        architectures.convert_bert(opened("hf_clip")[0])
    with pytest.raises(UserError, match=r"no CLIP: its arrays are bert\.embeddings"):
        architectures.convert_clip(opened("cxr_bert")[0])
    with pytest.raises(UserError, match="is missing"):
        architectures.convert_biclip(opened("cxr_bert")[0])


@pytest.mark.parametrize(
    ("kind", "name", "hf_config", "said"),
    [
        ("bert", "cxr_bert", {"hidden_act": "relu"}, "hidden_act 'relu'; expected gelu, quick_"),
        ("clip", "hf_clip", {"vision_config": {"hidden_act": "silu"}}, "hidden_act 'silu'"),
        ("clip", "hf_clip", {"text_config": {"hidden_act": "gelu_new"}}, "hidden_act 'gelu_new'"),
        ("clip", "openai_vit", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        (
            "bert",
            "cxr_bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type relative_key",
        ),
    ],
)
def test_what_is_not_built_is_refused(kind, name, hf_config, said):
    convert = getattr(architectures, f"convert_{kind}")
    with pytest.raises(UserError, match=said):
        convert(opened(name)[0], hf_config)


@pytest.mark.parametrize(
    ("kind", "name", "hf_config"),
    [
        ("bert", "cxr_bert", {"num_attention_heads": 5}),
        ("clip", "hf_clip", {"vision_config": {"num_attention_heads": 3}}),
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
        ("clip", "hf_clip", "text_projection.weight", (9, 12)),
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
    expected = architectures.convert_clip(opened("openai_vit")[0])
    same(architectures.convert_clip(renamed), expected)


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
