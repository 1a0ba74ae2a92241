"""Conversion of the published BiCLIP, whose checkpoint includes the text encoder."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import biclip_jax
from biclip_jax.encoders import text as text_encoders
from biclip_jax.models import biclip
from biclip_jax.weights import architectures, keys, model_folder, readers
from tests.conversions import ENCODERS, assert_close, run

PROMPT = "infection, upper left lung."
TEXT = {"encoder": "bert", "trainable": False, "pooling": "all_tokens", "max_length": 32}
NETWORK = {"image_size": 56, "width": 4, "num_levels": 3, "dtype": "float32", "text": TEXT}


def to_torch(parameter, layout):
    """Returns PyTorch's array of a parameter that has a single source."""
    axes = {"linear": (1, 0), "conv": (3, 2, 0, 1), "conv_transpose": (2, 3, 0, 1)}
    return np.ascontiguousarray(parameter.transpose(axes[layout]) if layout in axes else parameter)


@pytest.fixture(scope="module")
def checkpoint():
    """Returns the published network's arrays by name, with a tiny CXR-BERT of 40 positions."""
    rng = np.random.default_rng(0)
    tensors = {
        f"model.text_encoder.model.{name}": tensor.read()
        for name, tensor in readers.open_checkpoint(ENCODERS / "cxr_bert").tensors.items()
    }
    positions = "model.text_encoder.model.bert.embeddings.position_embeddings.weight"
    tensors[positions] = rng.normal(size=(40, 12)).astype(np.float32)
    tensors.pop("model.text_encoder.model.bert.embeddings.position_ids")
    image, features = jnp.zeros((1, 56, 56, 3)), jnp.zeros((1, 12))
    model = biclip.build(NETWORK)
    shapes = architectures.shapes_of(model, image, text_features=features)
    for name, rule in keys.biclip(3, 1).items():
        array = rng.normal(size=shapes[name]) * (0.1 if rule.layout == "linear" else 0.3)
        if name.endswith(("/scale", "/var")):
            array = 1 + np.abs(array)
        if name == "params/unet/head/kernel":
            array *= 0.01
        (source,) = rule.sources
        tensors[f"model.{source}"] = to_torch(array.astype(np.float32), rule.layout)
        if source.endswith("running_var"):
            counter = source.removesuffix("running_var") + "num_batches_tracked"
            tensors[f"model.{counter}"] = np.array(3)
    return tensors


@pytest.fixture(scope="module")
def network(checkpoint, tmp_path_factory):
    base = tmp_path_factory.mktemp("biclip")
    save_file(checkpoint, base / "last.safetensors")
    # For the number of heads of the text encoder, which the arrays do not contain.
    shutil.copy(ENCODERS / "cxr_bert/config.json", base)
    tokenizer = ENCODERS / "cxr_bert"
    assert run("biclip", base / "last.safetensors", base / "out", "--tokenizer", tokenizer) == 0
    return base / "out"


def test_converted_network_includes_its_text_encoder(network, checkpoint):
    files = {str(p.relative_to(network)) for p in network.rglob("*") if p.is_file()}
    names = {"README.md", "config.json", "model.safetensors", "tokenizer/tokenizer.json"}
    assert files == names | {f"text_encoder/{name}" for name in names}
    config, variables = model_folder.read(network)
    assert config["model"] == NETWORK
    assert (config["kind"], config["vocab_size"]) == ("biclip", 16)
    encoder = model_folder.read_config(network / "text_encoder")
    assert config["text_encoder_sha256"] == model_folder.identity(encoder)
    assert encoder["kind"] == "bert"
    assert encoder["model"]["num_heads"] == 2
    unet = variables["params"]["unet"]
    np.testing.assert_array_equal(
        unet["encoder_1"]["conv_0"]["kernel"],
        checkpoint["model.down1.maxpool_conv.1.double_conv.0.weight"].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(
        unet["up_1"]["kernel"], checkpoint["model.up1.up.weight"].transpose(2, 3, 0, 1)
    )
    np.testing.assert_array_equal(
        variables["params"]["refiner"]["mlp"]["out"]["kernel"],
        checkpoint["model.text_refiner.mlp.3.weight"].T,
    )
    np.testing.assert_array_equal(
        variables["batch_stats"]["unet"]["decoder_0"]["norm_1"]["var"],
        checkpoint["model.up2.conv.double_conv.4.running_var"],
    )
    assert "text_encoder" not in variables["params"]


@pytest.mark.slow
def test_converted_network_segments_with_the_hidden_states_of_its_encoder(network):
    model, variables, processor = biclip_jax.load_model(network)
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3)).astype(np.uint8)
    inputs = processor([pixels], [PROMPT])
    ids, mask = jnp.asarray(inputs["text_ids"]), jnp.asarray(inputs["text_mask"])
    assert ids.shape == (1, 32)
    encoder = text_encoders.open_text_encoder(network / "text_encoder", "bert")
    _, aux = jax.jit(encoder.module.apply)({"params": encoder.params}, ids, mask)
    states = [np.asarray(state) for state in aux["hidden_states"]]
    features = jnp.asarray(((states[1] + states[2] + states[-1]) / 3).mean(axis=1))
    image = jnp.asarray(inputs["image"], jnp.float32) / 255
    apply = jax.jit(lambda v, **text: model.apply(v, image, **text)[0])
    expected = apply(variables, text_features=features)
    assert_close(apply(variables, text_ids=ids, text_mask=mask), expected, 1e-4)
    assert np.abs(apply(variables, text_features=features * 0) - expected).max() > 1e-3
    prediction = biclip_jax.load(network).predict(pixels, PROMPT)
    assert prediction.probability.std() > 0.01
    assert_close(prediction.probability, 1 / (1 + np.exp(-np.asarray(expected)[0, ..., 0])), 1e-4)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("outc.conv.weight", "outc.conv.weight is missing"),
        ("inc.double_conv.0.weight", "inc.double_conv.0.weight is missing"),
        ("up2.conv.double_conv.4.running_var", "up2.conv.double_conv.4.running_var is missing"),
        (
            "text_encoder.model.bert.encoder.layer.2.output.dense.bias",
            "bert.encoder.layer.2.output.dense.bias is missing",
        ),
        ("text_encoder.model.", "text_encoder.model.* is missing"),
        ("generator.", "generator.0.weight is missing"),
        ("down1.", "down1."),
    ],
)
def test_error_names_a_missing_array(checkpoint, tmp_path, capsys, removed, message):
    remaining = {k: v for k, v in checkpoint.items() if not k.startswith(f"model.{removed}")}
    assert len(remaining) < len(checkpoint)
    save_file(remaining, tmp_path / "last.safetensors")
    shutil.copy(ENCODERS / "cxr_bert/config.json", tmp_path)
    argv = ("biclip", tmp_path / "last.safetensors", tmp_path / "out")
    assert run(*argv, "--tokenizer", ENCODERS / "cxr_bert") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_max_length_is_that_of_the_prompts(network, tmp_path):
    argv = ("biclip", network.parent / "last.safetensors", tmp_path / "out")
    assert run(*argv, "--tokenizer", ENCODERS / "cxr_bert", "--max-length", 40) == 0
    _, _, processor = biclip_jax.load_model(tmp_path / "out")
    assert processor.encode([PROMPT])["text_ids"].shape == (1, 40)


@pytest.mark.parametrize("length", [2, 0, -1, 41])
def test_rejects_a_max_length_beyond_the_positions_of_the_encoder(
    network, tmp_path, capsys, length
):
    argv = ("biclip", network.parent / "last.safetensors", tmp_path / "out")
    assert run(*argv, "--tokenizer", ENCODERS / "cxr_bert", "--max-length", length) == 2
    message = f"--max-length {length}: expected 3 to 40 tokens"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rejects_max_length_for_a_single_encoder(tmp_path, capsys):
    assert run("bert", ENCODERS / "cxr_bert", tmp_path / "out", "--max-length", "9") == 2
    assert "model.text.max_length" in capsys.readouterr().err
