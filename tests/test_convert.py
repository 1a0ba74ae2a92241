"""The conversion door: others' weights in, a folder out that opens and answers as they do."""

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
from tests.conversions import TOWERS, answers, close, run, save_clip_tokenizer

SENTENCE = "infection, upper left lung."


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    out = tmp_path_factory.mktemp("clip") / "out"
    assert run("clip", TOWERS / "hf_clip", out) == 0
    return out


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    out = tmp_path_factory.mktemp("bert") / "out"
    assert run("bert", TOWERS / "cxr_bert", out) == 0
    return out


def test_clip_opens_and_answers_as_its_authors_do(clip):
    model, variables, processor = biclip_jax.load_model(clip)
    expected = answers("hf_clip")
    logits, aux = jax.jit(model.apply)(variables, expected["image"], expected["ids"])
    close(logits, expected["logits"])
    close(aux["image_embedding"], expected["image_embedding"])
    inputs = processor([np.zeros((40, 30, 1), np.uint8)], ["left lung"])
    assert inputs["image"].shape == (1, 32, 32, 3)
    assert inputs["text_ids"].shape == (1, 10)
    assert inputs["text_ids"][0, :2].tolist()[0] == 518
    assert inputs["text_ids"].max() == 519


def test_bert_opens_and_answers_as_its_authors_do(bert):
    model, variables, processor = biclip_jax.load_model(bert)
    expected = answers("cxr_bert")
    embedding, aux = jax.jit(model.apply)(variables, expected["ids"], expected["mask"])
    close(jnp.stack(aux["hidden_states"]), expected["states"])
    close(embedding, expected["projected"])
    ids = processor.encode(["left lung infection."])["text_ids"]
    assert ids[0, :6].tolist() == [2, 6, 8, 11, 13, 3]
    with pytest.raises(ValueError, match="text tower"):
        processor([np.zeros((4, 4, 1), np.uint8)], [SENTENCE])


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_the_folder_is_whole_and_names_its_origin(kind, request):
    out = request.getfixturevalue(kind)
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert files == ["README.md", "config.json", "model.safetensors", "tokenizer/tokenizer.json"]
    config = json.loads((out / "config.json").read_text())
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert config["sha256"] == digest
    assert config["kind"] == kind
    name, read_as = {"clip": ("hf_clip", "safetensors"), "bert": ("cxr_bert", "torch")}[kind]
    assert (config["origin"]["source"], config["origin"]["read_as"]) == (name, read_as)
    held = readers.open_checkpoint(out / "model.safetensors").tensors
    report = config["origin"]["report"]
    assert sorted(report["loaded"]) == sorted(held)
    assert set(report) == {"loaded", "reshaped", "unused", "fresh"}
    if kind == "bert":
        assert len(report["unused"]) == 8
    tokenizer = (out / model_folder.TOKENIZER).read_bytes()
    assert config["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert config["format"] == model_folder.FORMAT
    assert f"# {kind} from {name}" in (out / "README.md").read_text()


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_a_tower_does_not_segment(kind, request):
    with pytest.raises(UserError, match="which does not segment pictures"):
        biclip_jax.load(request.getfixturevalue(kind))


def test_the_report_is_printed(tmp_path, capsys):
    assert run("bert", TOWERS / "cxr_bert", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: bert, 47 loaded" in said
    assert "unused: bert.embeddings.position_ids, cls.predictions" in said
    assert "and 3 more" in said


@pytest.mark.parametrize("name", ["hf_clip_flax", "hf_clip_sharded"])
def test_every_format_gives_the_same_weights(clip, tmp_path, name):
    place = TOWERS / "hf_clip/bpe_simple_vocab_16e6.txt.gz"
    assert run("clip", TOWERS / name, tmp_path / "out", "--tokenizer", place) == 0
    config, expected = (
        json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", clip)
    )
    assert config["model"] == expected["model"]
    found, wanted = (
        readers.open_checkpoint(p / "model.safetensors").tensors for p in (tmp_path / "out", clip)
    )
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        close(tensor.read(), wanted[key].read(), 1e-6)


def test_openai_s_archive_takes_the_tokenizer_that_is_given(tmp_path):
    place = save_clip_tokenizer(tmp_path / "tokenizer.json", 60)
    source = TOWERS / "openai_vit/ViT.pt"
    assert run("clip", source, tmp_path / "out", "--tokenizer", place) == 0
    model, variables, processor = biclip_jax.load_model(tmp_path / "out")
    expected = answers("openai_vit")
    ids = processor.encode(["w5 w7", "w9 w2 w8 w33"])["text_ids"]
    assert ids[0].tolist() == [58, 5, 7, 59, 0, 0, 0, 0, 0]
    assert ids[1].tolist() == [58, 9, 2, 8, 33, 59, 0, 0, 0]
    logits, _ = jax.jit(model.apply)(variables, expected["image"], expected["ids"])
    close(logits, expected["logits"], 5e-3)


def test_a_tokenizer_with_more_words_than_the_weights_is_refused(tmp_path, capsys):
    source, out = TOWERS / "openai_vit/ViT.pt", tmp_path / "out"
    assert run("clip", source, out, "--tokenizer", TOWERS / "hf_clip") == 2
    said = capsys.readouterr().err
    assert f"{TOWERS / 'hf_clip'}: the tokenizer's largest id is 519, the weights have 60" in said
    assert not out.exists()


def test_weights_without_a_tokenizer_beside_them_are_refused(tmp_path, capsys):
    assert run("clip", TOWERS / "openai_vit/ViT.pt", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "bpe_simple_vocab_16e6.txt.gz" in said
    assert said.endswith("Or give the tokenizer's file or folder by --tokenizer.\n")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_given_and_no_good_is_named(tmp_path, capsys):
    argv = ("bert", TOWERS / "cxr_bert", tmp_path / "out", "--tokenizer", tmp_path)
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert str(tmp_path) in said
    assert "Or give" not in said
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_the_weights_is_said_before_the_tokenizer_is_missed(tmp_path, capsys):
    source = tmp_path / "model.safetensors"
    save_file({"bert.embeddings.word_embeddings.weight": np.zeros((16, 512), np.float32)}, source)
    assert run("bert", tmp_path, tmp_path / "out") == 2
    assert "position_embeddings.weight is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_in_out_is_replaced_only_when_asked(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("bert", TOWERS / "cxr_bert", out) == 0
    before = (out / "config.json").read_bytes()
    again = ("clip", TOWERS / "hf_clip", out)
    assert run(*again) == 2
    assert "holds a model already; give another OUT, or --overwrite" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == before
    assert run(*again, "--overwrite") == 0
    assert type(biclip_jax.load_model(out)[0]).__name__ == "CLIP"


def test_an_empty_folder_is_a_new_one(tmp_path):
    (tmp_path / "out").mkdir()
    assert run("bert", TOWERS / "cxr_bert", tmp_path / "out") == 0


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_an_out_that_is_no_model_folder_stays_as_it_is(tmp_path, capsys, more):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text("mine")
    assert run("bert", TOWERS / "cxr_bert", tmp_path, *more) == 2
    assert f"{tmp_path}: holds other files; give an empty or a new" in capsys.readouterr().err
    assert run("bert", TOWERS / "cxr_bert", tmp_path / "README.md", *more) == 2
    assert "README.md: a file; give a folder as OUT" in capsys.readouterr().err
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
@pytest.mark.parametrize("given", ["", "pytorch_model.bin"])
def test_the_source_s_own_folder_is_not_written_to(tmp_path, capsys, given, more):
    source = copied("cxr_bert", tmp_path)
    before = {path: path.read_bytes() for path in source.iterdir()}
    assert run("bert", source / given, tmp_path / "x/../source", *more) == 2
    assert "holds SOURCE itself; give another OUT" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_a_source_that_was_converted_already_is_refused(bert, tmp_path, capsys):
    assert run("bert", bert, tmp_path / "out") == 2
    assert f"{bert}: a model folder already; open it with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_runs_a_command_is_refused_and_not_run(tmp_path, capsys):
    marker, source = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    source.write_bytes(pickle.dumps({"bert.embeddings": Evil(marker)}, protocol=2))
    shutil.copy(TOWERS / "cxr_bert/vocab.txt", tmp_path)
    assert run("bert", tmp_path, tmp_path / "out") == 2
    assert str(source) in capsys.readouterr().err
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(source.read_bytes())
    assert marker.exists()


def copied(name, tmp_path):
    return Path(shutil.copytree(TOWERS / name, tmp_path / "source"))


@pytest.mark.parametrize("kept", [4, 500, -3])
def test_a_truncated_file_is_named(tmp_path, capsys, kept):
    source = copied("hf_clip", tmp_path)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert run("clip", source, tmp_path / "out") == 2
    assert str(weights) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "no JSON"), ("[1]", "a JSON list; expected an object"), ("\xff", "config.json")],
)
def test_a_config_that_is_none_is_named(tmp_path, capsys, text, said):
    source = copied("hf_clip", tmp_path)
    (source / "config.json").write_bytes(text.encode("latin-1"))
    assert run("clip", source, tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert str(source / "config.json") in printed


@pytest.mark.parametrize(("kind", "name"), [("bert", "hf_clip"), ("clip", "cxr_bert")])
def test_the_kinds_are_not_taken_for_one_another(tmp_path, capsys, kind, name):
    said = {"bert": "no BERT: its arrays are logit_scale", "clip": "no CLIP: its arrays are bert."}
    assert run(kind, TOWERS / name, tmp_path / "out") == 2
    assert said[kind] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
