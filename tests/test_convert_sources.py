"""What the conversion door may be given: open_clip's configs, names on the hub."""

import fnmatch
import json
import shutil

import huggingface_hub
import pytest

from biclip_jax import convert
from biclip_jax.core.errors import UserError
from biclip_jax.weights import architectures
from tests.conversions import TOWERS, run, save_clip_tokenizer


def open_clip(tmp_path, **changes):
    """A folder of open_clip with OpenAI's tiny ViT, whose widths are 16 and 12, or as changed."""
    shutil.copy(TOWERS / "openai_vit/ViT.pt", tmp_path / "open_clip_pytorch_model.bin")
    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    model = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {"width": 16, "heads": 4}, **changes}
    config = {"model_cfg": model, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "activation"),
    [({}, "gelu"), ({"quick_gelu": False}, "gelu"), ({"quick_gelu": True}, "quick_gelu")],
)
def test_open_clip_s_config_tells_heads_and_activation(tmp_path, changes, activation):
    source = open_clip(tmp_path, **changes)
    place = save_clip_tokenizer(tmp_path / "words.tokenizer.json", 60)
    assert run("clip", source, tmp_path / "out", "--tokenizer", place) == 0
    model = json.loads((tmp_path / "out/config.json").read_text())["model"]
    assert (model["image"]["num_heads"], model["text"]["num_heads"]) == (2, 4)
    assert (model["image"]["activation"], model["text"]["activation"]) == (activation,) * 2


def test_open_clip_s_heads_are_64_wide_unless_it_says_otherwise(tmp_path):
    vision = {"width": 768, "layers": 12}
    config = convert.read_hf_config(open_clip(tmp_path, vision_cfg=vision), None)
    assert config["vision_config"]["num_attention_heads"] == 12
    overridden = convert.read_hf_config(tmp_path, "quick_gelu")
    for part in ("vision_config", "text_config"):
        assert overridden[part] == config[part] | {"hidden_act": "quick_gelu"}


def test_hugging_face_s_config_comes_before_open_clip_s(tmp_path):
    shutil.copy(TOWERS / "hf_clip/config.json", open_clip(tmp_path))
    config = convert.read_hf_config(tmp_path, None)
    assert config == json.loads((TOWERS / "hf_clip/config.json").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_cfg": {"width": 16, "head_width": 0}},
        {"vision_cfg": {"width": "16"}},
        {"vision_cfg": [1]},
        {"text_cfg": None},
    ],
)
def test_an_open_clip_config_that_is_none_is_named(tmp_path, changes):
    with pytest.raises(UserError, match=r"open_clip_config\.json: not as open_clip writes it"):
        convert.read_hf_config(open_clip(tmp_path, **changes), None)


def test_towers_of_other_libraries_inside_open_clip_tell_their_own_heads_and_activation(tmp_path):
    """timm's ViT and Hugging Face's BERT: open_clip's defaults are not theirs."""
    vision, text = {"timm_model_name": "vit_base_patch16_224"}, {"hf_model_name": "someone/bert"}
    config = convert.read_hf_config(open_clip(tmp_path, vision_cfg=vision), None)
    own = {"hidden_act": "gelu", "num_attention_heads": 4}
    assert config == {"vision_config": {}, "text_config": own}
    config = convert.read_hf_config(open_clip(tmp_path, vision_cfg=vision, text_cfg=text), None)
    assert config == {"vision_config": {}, "text_config": {}}
    config = convert.read_hf_config(open_clip(tmp_path, text_cfg=text, quick_gelu=True), None)
    own = {"hidden_act": "quick_gelu", "num_attention_heads": 2}
    assert config == {"vision_config": own, "text_config": {}}


def test_what_open_clip_leaves_out_has_its_default(tmp_path):
    folder = open_clip(tmp_path, vision_cfg={"layers": 2}, text_cfg={"width": 512})
    config = convert.read_hf_config(folder, None)
    assert config["vision_config"]["num_attention_heads"] == 12
    assert config["text_config"]["num_attention_heads"] == 8


def test_what_is_assumed_without_a_config_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(architectures, "KNOWN_WIDTHS", (16, 12))
    monkeypatch.setattr(architectures, "HEAD_SIZE", 4)
    source = shutil.copy(TOWERS / "openai_vit/ViT.pt", tmp_path)
    place = save_clip_tokenizer(tmp_path / "tokenizer.json", 60)
    said = "no config.json beside the weights: quick_gelu assumed (--activation)"
    assert run("clip", source, tmp_path / "out") == 0
    assert said in capsys.readouterr().out
    assert run("clip", source, tmp_path / "gelu", "--tokenizer", place, "--activation", "gelu") == 0
    assert said not in capsys.readouterr().out


def test_activation_reaches_the_config(tmp_path):
    out = tmp_path / "out"
    assert run("clip", TOWERS / "hf_clip", out, "--activation", "quick_gelu") == 0
    model = json.loads((out / "config.json").read_text())["model"]
    assert (model["image"]["activation"], model["text"]["activation"]) == ("quick_gelu",) * 2
    argv = ("bert", TOWERS / "cxr_bert", out, "--overwrite", "--activation", "quick_gelu")
    assert run(*argv) == 0
    assert json.loads((out / "config.json").read_text())["model"]["activation"] == "quick_gelu"


@pytest.mark.parametrize("argv", [("unet", "a", "b"), ("clip", "a"), ("clip", "a", "b", "--act")])
def test_a_command_that_is_none_is_exit_status_2(argv):
    assert run(*argv) == 2


def test_a_source_that_is_not_there_is_named(tmp_path, capsys):
    assert run("bert", tmp_path / "nowhere", tmp_path / "out") == 2
    assert f"'{tmp_path / 'nowhere'}': no such file or folder" in capsys.readouterr().err


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The names that `fetch` was asked for, in an empty working directory; it gives CXR-BERT."""
    asked = []

    def fetch(name):
        asked.append(name)
        return TOWERS / "cxr_bert"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert, "fetch", fetch)
    return asked


def test_a_name_on_the_hub_is_looked_up(offline, tmp_path, capsys):
    assert run("bert", "someone/cxr-bert", "out") == 0
    assert offline == ["someone/cxr-bert"]
    assert "asking the Hugging Face hub" in capsys.readouterr().out
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
def test_what_cannot_be_a_name_on_the_hub_is_not_asked_for(offline, tmp_path, capsys, source):
    (tmp_path / "here").mkdir()
    assert run("bert", source, "out") == 2
    assert f"{source!r}: no such file or folder; give the checkpoint" in capsys.readouterr().err
    assert offline == []


def test_a_folder_of_that_name_comes_before_the_hub(offline, tmp_path):
    shutil.copytree(TOWERS / "cxr_bert", tmp_path / "someone/cxr-bert")
    assert run("bert", "someone/cxr-bert", "out") == 0
    assert offline == []


@pytest.mark.parametrize("error", [OSError("offline\nmore"), KeyError("x"), RuntimeError()])
def test_a_hub_that_does_not_answer_is_one_sentence(offline, monkeypatch, capsys, error):
    def fetch(name):
        raise error

    monkeypatch.setattr(convert, "fetch", fetch)
    assert run("bert", "someone/cxr-bert", "out") == 2
    said = capsys.readouterr().err
    assert "the Hugging Face hub did not give it" in said
    assert "download it elsewhere and give the folder" in said
    assert len(said.splitlines()) == 1


@pytest.fixture
def hub(monkeypatch):
    """(files of the repository, what was asked for): huggingface_hub without a network."""
    files, asked = [], []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(TOWERS / "cxr_bert")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: list(files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return files, asked


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BIN_SHARDS = ["pytorch_model-00001-of-00001.bin"]


@pytest.mark.parametrize(
    ("weights", "taken"),
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
def test_one_format_of_weights_and_no_code_is_fetched(hub, weights, taken):
    files, asked = hub
    beside = ["config.json", "vocab.txt"]
    files += ["README.md", "modeling.py", "training_args.bin", *beside, *weights]
    assert convert.fetch("someone/cxr-bert") == TOWERS / "cxr_bert"
    ((name, patterns),) = asked
    assert name == "someone/cxr-bert"
    got = {file for file in files if any(fnmatch.fnmatch(file, one) for one in patterns)}
    assert got == {*beside, *taken}


def test_a_repository_without_weights_is_not_fetched(hub, tmp_path, monkeypatch, capsys):
    files, asked = hub
    files += ["README.md", "ViT-B-16.pt"]
    monkeypatch.chdir(tmp_path)
    assert run("clip", "someone/clip", "out") == 2
    assert "none of model.safetensors, " in capsys.readouterr().err
    assert asked == []
