"""Sources of `convert`: open_clip's configs, names on the Hugging Face hub."""

import fnmatch
import json
import shutil

import huggingface_hub
import pytest

from biclip_jax import convert
from biclip_jax.core.errors import UserError
from biclip_jax.weights import architectures
from tests.conversions import ENCODERS, run, save_clip_tokenizer


def open_clip(tmp_path, **changes):
    """Writes an open_clip folder with OpenAI's tiny ViT (widths 16 and 12) and config changes."""
    shutil.copy(ENCODERS / "openai_vit/ViT.pt", tmp_path / "open_clip_pytorch_model.bin")
    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    model = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {"width": 16, "heads": 4}, **changes}
    config = {"model_cfg": model, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "activation"),
    [({}, "gelu"), ({"quick_gelu": False}, "gelu"), ({"quick_gelu": True}, "quick_gelu")],
)
def test_open_clip_config_sets_heads_and_activation(tmp_path, changes, activation):
    source = open_clip(tmp_path, **changes)
    tokenizer = save_clip_tokenizer(tmp_path / "words.tokenizer.json", 60)
    assert run("clip", source, tmp_path / "out", "--tokenizer", tokenizer) == 0
    model = json.loads((tmp_path / "out/config.json").read_text())["model"]
    assert (model["image"]["num_heads"], model["text"]["num_heads"]) == (2, 4)
    assert (model["image"]["activation"], model["text"]["activation"]) == (activation,) * 2


def test_default_head_size_of_open_clip_is_64(tmp_path):
    vision = {"width": 768, "layers": 12}
    config = convert.read_hf_config(open_clip(tmp_path, vision_cfg=vision), None)
    assert config["vision_config"]["num_attention_heads"] == 12
    overridden = convert.read_hf_config(tmp_path, "quick_gelu")
    for part in ("vision_config", "text_config"):
        assert overridden[part] == config[part] | {"hidden_act": "quick_gelu"}


def test_hugging_face_config_takes_precedence_over_open_clip(tmp_path):
    shutil.copy(ENCODERS / "hf_clip/config.json", open_clip(tmp_path))
    config = convert.read_hf_config(tmp_path, None)
    assert config == json.loads((ENCODERS / "hf_clip/config.json").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_cfg": {"width": 16, "head_width": 0}},
        {"vision_cfg": {"width": "16"}},
        {"vision_cfg": [1]},
        {"text_cfg": None},
    ],
)
def test_rejects_an_invalid_open_clip_config(tmp_path, changes):
    with pytest.raises(UserError, match=r"open_clip_config\.json: not a valid open_clip config"):
        convert.read_hf_config(open_clip(tmp_path, **changes), None)


def test_encoders_of_other_libraries_in_open_clip_ignore_its_defaults(tmp_path):
    """timm's ViT and Hugging Face's BERT do not use open_clip's defaults."""
    vision, text = {"timm_model_name": "vit_base_patch16_224"}, {"hf_model_name": "someone/bert"}
    config = convert.read_hf_config(open_clip(tmp_path, vision_cfg=vision), None)
    expected = {"hidden_act": "gelu", "num_attention_heads": 4}
    assert config == {"vision_config": {}, "text_config": expected}
    config = convert.read_hf_config(open_clip(tmp_path, vision_cfg=vision, text_cfg=text), None)
    assert config == {"vision_config": {}, "text_config": {}}
    config = convert.read_hf_config(open_clip(tmp_path, text_cfg=text, quick_gelu=True), None)
    expected = {"hidden_act": "quick_gelu", "num_attention_heads": 2}
    assert config == {"vision_config": expected, "text_config": {}}


def test_fields_missing_from_the_open_clip_config_have_its_defaults(tmp_path):
    folder = open_clip(tmp_path, vision_cfg={"layers": 2}, text_cfg={"width": 512})
    config = convert.read_hf_config(folder, None)
    assert config["vision_config"]["num_attention_heads"] == 12
    assert config["text_config"]["num_attention_heads"] == 8


def test_prints_what_is_assumed_without_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(architectures, "KNOWN_WIDTHS", (16, 12))
    monkeypatch.setattr(architectures, "HEAD_SIZE", 4)
    source = shutil.copy(ENCODERS / "openai_vit/ViT.pt", tmp_path)
    tokenizer = save_clip_tokenizer(tmp_path / "tokenizer.json", 60)
    message = "no config.json beside the weights; assuming quick_gelu (see --activation)"
    assert run("clip", source, tmp_path / "out") == 0
    assert message in capsys.readouterr().out
    assert (
        run("clip", source, tmp_path / "gelu", "--tokenizer", tokenizer, "--activation", "gelu")
        == 0
    )
    assert message not in capsys.readouterr().out


def test_activation_is_written_to_the_config(tmp_path):
    out = tmp_path / "out"
    assert run("clip", ENCODERS / "hf_clip", out, "--activation", "quick_gelu") == 0
    model = json.loads((out / "config.json").read_text())["model"]
    assert (model["image"]["activation"], model["text"]["activation"]) == ("quick_gelu",) * 2
    argv = ("bert", ENCODERS / "cxr_bert", out, "--overwrite", "--activation", "quick_gelu")
    assert run(*argv) == 0
    assert json.loads((out / "config.json").read_text())["model"]["activation"] == "quick_gelu"


@pytest.mark.parametrize("argv", [("unet", "a", "b"), ("clip", "a"), ("clip", "a", "b", "--act")])
def test_invalid_arguments_exit_with_status_2(argv):
    assert run(*argv) == 2


def test_error_names_a_missing_source(tmp_path, capsys):
    assert run("bert", tmp_path / "nowhere", tmp_path / "out") == 2
    assert f"'{tmp_path / 'nowhere'}': no such file or folder" in capsys.readouterr().err


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Replaces `fetch` by a CXR-BERT, in an empty working directory; returns the requests."""
    requested = []

    def fetch(name):
        requested.append(name)
        return ENCODERS / "cxr_bert"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert, "fetch", fetch)
    return requested


def test_looks_up_a_name_on_the_hub(offline, tmp_path, capsys):
    assert run("bert", "someone/cxr-bert", "out") == 0
    assert offline == ["someone/cxr-bert"]
    assert "trying the Hugging Face hub" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["origin"]["source"] == "cxr_bert"


@pytest.mark.parametrize(
    "source",
    [
        "",
        "nowhere",
        "here/nowhere",
        "a/b/c",
        "./a",
        "../a/b",
        "/a/b",
        "~/b",
        "a/../b",
        "a/",
        "a/.b",
        "someone/last.ckpt",
        "someone/model.safetensors",
        "someone/a name",
        "someone/name\n",
        "https://huggingface.co/someone/name",
    ],
)
def test_rejects_names_that_are_invalid_on_the_hub(offline, tmp_path, capsys, source):
    (tmp_path / "here").mkdir()
    assert run("bert", source, "out") == 2
    assert (
        f"{source!r}: no such file or folder; give the path of the checkpoint"
        in capsys.readouterr().err
    )
    assert offline == []


def test_a_folder_takes_precedence_over_the_hub(offline, tmp_path):
    shutil.copytree(ENCODERS / "cxr_bert", tmp_path / "someone/cxr-bert")
    assert run("bert", "someone/cxr-bert", "out") == 0
    assert offline == []


@pytest.mark.parametrize("error", [OSError("offline\nmore"), KeyError("x"), RuntimeError()])
def test_a_failed_download_is_a_one_line_error(offline, monkeypatch, capsys, error):
    def fetch(name):
        raise error

    monkeypatch.setattr(convert, "fetch", fetch)
    assert run("bert", "someone/cxr-bert", "out") == 2
    message = capsys.readouterr().err
    assert "the Hugging Face hub failed" in message
    assert "download it elsewhere and give the folder" in message
    assert len(message.splitlines()) == 1


@pytest.fixture
def hub(monkeypatch):
    """Replaces huggingface_hub; returns the files of the repository and the downloads requested."""
    files, requested = [], []

    def snapshot_download(name, allow_patterns):
        requested.append((name, allow_patterns))
        return str(ENCODERS / "cxr_bert")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: list(files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return files, requested


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BIN_SHARDS = ["pytorch_model-00001-of-00001.bin"]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (["pytorch_model.bin", "flax_model.msgpack"], ["flax_model.msgpack"]),
        (["pytorch_model.bin", "model.safetensors", "tf_model.h5"], ["model.safetensors"]),
        (["model.safetensors", "model.safetensors.index.json", *SHARDS], ["model.safetensors"]),
        (["model.safetensors", "open_clip_model.safetensors"], ["model.safetensors"]),
        (
            ["model.safetensors.index.json", *SHARDS, "pytorch_model.bin"],
            ["model.safetensors.index.json", *SHARDS],
        ),
        (
            ["pytorch_model.bin.index.json", *BIN_SHARDS],
            ["pytorch_model.bin.index.json", *BIN_SHARDS],
        ),
        (["open_clip_pytorch_model.bin"], ["open_clip_pytorch_model.bin"]),
    ],
)
def test_downloads_one_format_of_the_weights_and_no_code(hub, weights, expected):
    files, requested = hub
    other_files = ["config.json", "vocab.txt"]
    files += ["README.md", "modeling.py", "training_args.bin", *other_files, *weights]
    assert convert.fetch("someone/cxr-bert") == ENCODERS / "cxr_bert"
    ((name, patterns),) = requested
    assert name == "someone/cxr-bert"
    downloaded = {
        file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
    }
    assert downloaded == {*other_files, *expected}


def test_rejects_a_repository_without_weights(hub, tmp_path, monkeypatch, capsys):
    files, requested = hub
    files += ["README.md", "ViT-B-16.pt"]
    monkeypatch.chdir(tmp_path)
    assert run("clip", "someone/clip", "out") == 2
    assert "none of model.safetensors, " in capsys.readouterr().err
    assert requested == []
