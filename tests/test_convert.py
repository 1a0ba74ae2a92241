"""`convert`: converted models give the outputs of the originals; invalid input is refused."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import biclip_jax
from biclip_jax.core.errors import UserError
from biclip_jax.weights import model_folder, readers
from tests.conversions import ENCODERS, assert_close, expected_outputs, run, save_clip_tokenizer

PROMPT = "infection, upper left lung."


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    out = tmp_path_factory.mktemp("clip") / "out"
    assert run("clip", ENCODERS / "hf_clip", out) == 0
    return out


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    out = tmp_path_factory.mktemp("bert") / "out"
    assert run("bert", ENCODERS / "cxr_bert", out) == 0
    return out


def test_clip_gives_the_outputs_of_the_original(clip):
    model, variables, processor = biclip_jax.load_model(clip)
    expected = expected_outputs("hf_clip")
    logits, aux = jax.jit(model.apply)(variables, expected["image"], expected["ids"])
    assert_close(logits, expected["logits"])
    assert_close(aux["image_embedding"], expected["image_embedding"])
    inputs = processor([np.zeros((40, 30, 1), np.uint8)], ["left lung"])
    assert inputs["image"].shape == (1, 32, 32, 3)
    assert inputs["text_ids"].shape == (1, 10)
    assert inputs["text_ids"][0, :2].tolist()[0] == 518
    assert inputs["text_ids"].max() == 519


def test_bert_gives_the_outputs_of_the_original(bert):
    model, variables, processor = biclip_jax.load_model(bert)
    expected = expected_outputs("cxr_bert")
    embedding, aux = jax.jit(model.apply)(variables, expected["ids"], expected["mask"])
    assert_close(jnp.stack(aux["hidden_states"]), expected["states"])
    assert_close(embedding, expected["projected"])
    ids = processor.encode(["left lung infection."])["text_ids"]
    assert ids[0, :6].tolist() == [2, 6, 8, 11, 13, 3]
    with pytest.raises(ValueError, match="text encoder has no image input"):
        processor([np.zeros((4, 4, 1), np.uint8)], [PROMPT])


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_folder_is_complete_and_records_its_origin(kind, request):
    out = request.getfixturevalue(kind)
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert files == ["README.md", "config.json", "model.safetensors", "tokenizer/tokenizer.json"]
    config = json.loads((out / "config.json").read_text())
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert config["sha256"] == digest
    assert config["kind"] == kind
    name, read_as = {"clip": ("hf_clip", "safetensors"), "bert": ("cxr_bert", "torch")}[kind]
    assert (config["origin"]["source"], config["origin"]["read_as"]) == (name, read_as)
    tensors = readers.open_checkpoint(out / "model.safetensors").tensors
    report = config["origin"]["report"]
    assert sorted(report["loaded"]) == sorted(tensors)
    assert set(report) == {"loaded", "reshaped", "unused", "fresh"}
    if kind == "bert":
        assert len(report["unused"]) == 8
    tokenizer = (out / model_folder.TOKENIZER).read_bytes()
    assert config["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert config["format"] == model_folder.FORMAT
    assert f"# {kind} from {name}" in (out / "README.md").read_text()


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_rejects_an_encoder_for_segmentation(kind, request):
    with pytest.raises(UserError, match="which does not segment images"):
        biclip_jax.load(request.getfixturevalue(kind))


def test_prints_the_report(tmp_path, capsys):
    assert run("bert", ENCODERS / "cxr_bert", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: bert, 47 loaded" in printed
    assert "unused: bert.embeddings.position_ids, cls.predictions" in printed
    assert "and 3 more" in printed


@pytest.mark.parametrize("name", ["hf_clip_flax", "hf_clip_sharded"])
def test_every_format_gives_the_same_weights(clip, tmp_path, name):
    tokenizer = ENCODERS / "hf_clip/bpe_simple_vocab_16e6.txt.gz"
    assert run("clip", ENCODERS / name, tmp_path / "out", "--tokenizer", tokenizer) == 0
    config, expected = (
        json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", clip)
    )
    assert config["model"] == expected["model"]
    tensors, expected_tensors = (
        readers.open_checkpoint(p / "model.safetensors").tensors for p in (tmp_path / "out", clip)
    )
    assert tensors.keys() == expected_tensors.keys()
    for key, tensor in tensors.items():
        assert_close(tensor.read(), expected_tensors[key].read(), 1e-6)


def test_openai_archive_uses_the_given_tokenizer(tmp_path):
    tokenizer = save_clip_tokenizer(tmp_path / "tokenizer.json", 60)
    source = ENCODERS / "openai_vit/ViT.pt"
    assert run("clip", source, tmp_path / "out", "--tokenizer", tokenizer) == 0
    model, variables, processor = biclip_jax.load_model(tmp_path / "out")
    expected = expected_outputs("openai_vit")
    ids = processor.encode(["w5 w7", "w9 w2 w8 w33"])["text_ids"]
    assert ids[0].tolist() == [58, 5, 7, 59, 0, 0, 0, 0, 0]
    assert ids[1].tolist() == [58, 9, 2, 8, 33, 59, 0, 0, 0]
    logits, _ = jax.jit(model.apply)(variables, expected["image"], expected["ids"])
    assert_close(logits, expected["logits"], 5e-3)


def test_rejects_a_tokenizer_with_more_words_than_the_weights(tmp_path, capsys):
    source, out = ENCODERS / "openai_vit/ViT.pt", tmp_path / "out"
    assert run("clip", source, out, "--tokenizer", ENCODERS / "hf_clip") == 2
    printed = capsys.readouterr().err
    assert (
        f"{ENCODERS / 'hf_clip'}: the tokenizer's largest id is 519, but the weights have 60"
        in printed
    )
    assert not out.exists()


def test_rejects_weights_without_a_tokenizer(tmp_path, capsys):
    assert run("clip", ENCODERS / "openai_vit/ViT.pt", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert "bpe_simple_vocab_16e6.txt.gz" in printed
    assert printed.endswith("Or give its file or folder with --tokenizer.\n")
    assert not (tmp_path / "out").exists()


def test_error_names_an_invalid_given_tokenizer(tmp_path, capsys):
    argv = ("bert", ENCODERS / "cxr_bert", tmp_path / "out", "--tokenizer", tmp_path)
    assert run(*argv) == 2
    printed = capsys.readouterr().err
    assert str(tmp_path) in printed
    assert "Or give" not in printed
    assert not (tmp_path / "out").exists()


def test_errors_of_the_weights_come_before_a_missing_tokenizer(tmp_path, capsys):
    source = tmp_path / "model.safetensors"
    save_file({"bert.embeddings.word_embeddings.weight": np.zeros((16, 512), np.float32)}, source)
    assert run("bert", tmp_path, tmp_path / "out") == 2
    assert "position_embeddings.weight is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_replaces_a_model_only_with_overwrite(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("bert", ENCODERS / "cxr_bert", out) == 0
    before = (out / "config.json").read_bytes()
    argv = ("clip", ENCODERS / "hf_clip", out)
    assert run(*argv) == 2
    assert "contains a model; give another OUT, or --overwrite" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == before
    assert run(*argv, "--overwrite") == 0
    assert type(biclip_jax.load_model(out)[0]).__name__ == "CLIP"


def test_accepts_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    assert run("bert", ENCODERS / "cxr_bert", tmp_path / "out") == 0


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_rejects_other_folders_as_out_and_keeps_them(tmp_path, capsys, more):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text("mine")
    assert run("bert", ENCODERS / "cxr_bert", tmp_path, *more) == 2
    assert f"{tmp_path}: contains other files; give an empty or a new" in capsys.readouterr().err
    assert run("bert", ENCODERS / "cxr_bert", tmp_path / "README.md", *more) == 2
    assert "README.md: found a file; expected a folder as OUT" in capsys.readouterr().err
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
@pytest.mark.parametrize("file_name", ["", "pytorch_model.bin"])
def test_rejects_the_source_folder_as_out(tmp_path, capsys, file_name, more):
    source = copy_fixture("cxr_bert", tmp_path)
    before = {path: path.read_bytes() for path in source.iterdir()}
    assert run("bert", source / file_name, tmp_path / "x/../source", *more) == 2
    assert "contains SOURCE; give another OUT" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_rejects_a_converted_source(bert, tmp_path, capsys):
    assert run("bert", bert, tmp_path / "out") == 2
    assert f"{bert}: already a model folder; load it with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class MaliciousPickle:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_rejects_a_malicious_pickle_without_running_it(tmp_path, capsys):
    marker, source = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    source.write_bytes(pickle.dumps({"bert.embeddings": MaliciousPickle(marker)}, protocol=2))
    shutil.copy(ENCODERS / "cxr_bert/vocab.txt", tmp_path)
    assert run("bert", tmp_path, tmp_path / "out") == 2
    assert str(source) in capsys.readouterr().err
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(source.read_bytes())
    assert marker.exists()


def copy_fixture(name, tmp_path):
    return Path(shutil.copytree(ENCODERS / name, tmp_path / "source"))


@pytest.mark.parametrize("length", [4, 500, -3])
def test_error_names_a_truncated_file(tmp_path, capsys, length):
    source = copy_fixture("hf_clip", tmp_path)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    assert run("clip", source, tmp_path / "out") == 2
    assert str(weights) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "invalid JSON"), ("[1]", "a JSON list; expected an object"), ("\xff", "config.json")],
)
def test_error_names_an_invalid_config(tmp_path, capsys, text, message):
    source = copy_fixture("hf_clip", tmp_path)
    (source / "config.json").write_bytes(text.encode("latin-1"))
    assert run("clip", source, tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert str(source / "config.json") in printed


@pytest.mark.parametrize(("kind", "name"), [("bert", "hf_clip"), ("clip", "cxr_bert")])
def test_rejects_weights_of_another_kind(tmp_path, capsys, kind, name):
    messages = {
        "bert": "no BERT: its arrays are logit_scale",
        "clip": "no CLIP: its arrays are bert.",
    }
    assert run(kind, ENCODERS / name, tmp_path / "out") == 2
    assert messages[kind] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
