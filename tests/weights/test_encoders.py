"""Converted encoders against outputs of the original models (fixtures/make_encoders.py)."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from biclip_jax.convert import read_hf_config
from biclip_jax.models import bert, clip
from biclip_jax.weights import architectures, readers

ENCODERS = Path(__file__).parent.parent / "fixtures/encoders"
CLIPS = ("hf_clip", "hf_clip_sharded", "hf_clip_flax", "hf_clip_flax_sharded")


@cache
def open_fixture(name, file=""):
    """Returns (converted, variables) of a fixture."""
    convert = architectures.convert_bert if "bert" in name else architectures.convert_clip
    source = ENCODERS / name / file
    converted = convert(readers.open_checkpoint(source), read_hf_config(source, None))
    return converted, jax.tree.map(jnp.asarray, unflatten_dict(converted.variables, sep="/"))


@cache
def expected_outputs(name):
    with np.load(ENCODERS / name / "expected.npz") as file:
        return {key: jnp.asarray(value) for key, value in file.items()}


def assert_close(actual, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=atol)


@pytest.mark.parametrize("name", CLIPS)
def test_clip_of_hugging_face_gives_every_hidden_state(name):
    converted, variables = open_fixture(name)
    model, expected = clip.build(converted.config), expected_outputs("hf_clip")
    logits, aux = jax.jit(model.apply)(variables, expected["image"], expected["ids"])
    assert_close(jnp.stack(aux["image"]["hidden_states"]), expected["image_states"])
    assert_close(aux["image"]["pooled"], expected["image_pooled"])
    assert_close(jnp.stack(aux["text"]["hidden_states"]), expected["text_states"])
    assert_close(aux["text"]["pooled"], expected["text_pooled"])
    assert_close(aux["image_embedding"], expected["image_embedding"])
    assert_close(aux["text_embedding"], expected["text_embedding"])
    assert_close(logits, expected["logits"])


def test_images_of_another_size_interpolate_the_positions():
    converted, variables = open_fixture("hf_clip")
    encoder, expected = (
        clip.build_image_encoder(converted.config["image"]),
        expected_outputs("hf_clip"),
    )
    parts = {"params": variables["params"]["image_encoder"]}
    _, aux = jax.jit(encoder.apply)(parts, expected["large"])
    assert_close(aux["hidden_states"][-1], expected["large_last"])


@pytest.mark.parametrize("name", ["cxr_bert", "bert_flax"])
def test_bert_gives_every_hidden_state(name):
    converted, variables = open_fixture(name)
    expected = expected_outputs("cxr_bert")
    embedding, aux = jax.jit(bert.build(converted.config).apply)(
        variables, expected["ids"], expected["mask"]
    )
    assert_close(jnp.stack(aux["hidden_states"]), expected["states"])
    if name == "cxr_bert":
        assert_close(embedding, expected["projected"])
    else:
        assert_close(embedding, expected["states"][-1][:, 0])


@pytest.mark.parametrize(
    ("name", "file", "atol"), [("openai_vit", "ViT.pt", 5e-3), ("openai_resnet", "RN.pt", 2e-5)]
)
def test_clip_of_openai_gives_every_hidden_state(name, file, atol):
    # The ViT is stored in half precision: the expected outputs are those of the rounded weights.
    converted, variables = open_fixture(name, file)
    model, expected = clip.build(converted.config), expected_outputs(name)
    logits, aux = jax.jit(model.apply)(variables, expected["image"], expected["ids"])
    for i, state in enumerate(aux["image"]["hidden_states"]):
        reference = expected[f"image_state_{i}"]
        assert_close(
            state, reference.transpose(0, 2, 3, 1) if reference.ndim == 4 else reference, atol
        )
    assert_close(jnp.stack(aux["text"]["hidden_states"]), expected["text_states"], atol)
    assert_close(logits, expected["logits"], atol)


def test_report_has_counts_and_names():
    report = open_fixture("cxr_bert")[0].report
    assert len(report.loaded) == 5 + 3 * 12 + 6
    assert len(report.reshaped) == 3 * 4 + 3 * 1 + 2
    assert set(report.unused) >= {"bert.embeddings.position_ids", "cls.predictions.bias"}
    assert report.fresh == ()
    assert f"{len(report.loaded)} loaded" in str(report)
    shown, more = report.unused[:5], len(report.unused) - 5
    assert more > 0
    assert str(report).endswith(f"unused: {', '.join(shown)} and {more} more")
