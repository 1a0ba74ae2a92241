"""The conversion door: others' weights in, a folder out that opens and answers as they do."""

import fnmatch
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import biclip_jax
from biclip_jax import convert, sentences
from biclip_jax.errors import UserError
from biclip_jax.models import biclip
from biclip_jax.weights import architectures, folder, keys, readers

TOWERS = Path(__file__).parent / "fixtures/towers"
SENTENCE = "infection, upper left lung."
TEXT = {"encoder": "bert", "trainable": False, "pooling": "all_tokens", "max_length": 32}
NETWORK = {"image_size": 56, "width": 4, "num_levels": 3, "dtype": "float32", "text": TEXT}


def run(*argv):
    with pytest.raises(SystemExit) as stopped:
        convert.main(list(map(str, argv)))
    return stopped.value.code


def answers(name):
    with np.load(TOWERS / name / "expected.npz") as file:
        return {key: jnp.asarray(value) for key, value in file.items()}


def close(found, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=atol)


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


def save_clip_tokenizer(path, num_words):
    """Words w0, w1, ... between the two tokens that CLIP puts around a sentence."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = [f"w{i}" for i in range(num_words - 2)] + [start, end]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(start, num_words - 2), (end, num_words - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=special
    )
    tokenizer.save(str(path))
    return path


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
    tokenizer = (out / folder.TOKENIZER).read_bytes()
    assert config["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert config["format"] == folder.FORMAT
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


def foreign(parameter, layout):
    """PyTorch's array of a parameter of ours, of the one that has a single source."""
    axes = {"linear": (1, 0), "conv": (3, 2, 0, 1), "conv_transpose": (2, 3, 0, 1)}
    return np.ascontiguousarray(parameter.transpose(axes[layout]) if layout in axes else parameter)


@pytest.fixture(scope="module")
def checkpoint():
    """The published network's arrays under its names, with a tiny CXR-BERT of 40 positions."""
    rng = np.random.default_rng(0)
    tensors = {
        f"model.text_encoder.model.{name}": tensor.read()
        for name, tensor in readers.open_checkpoint(TOWERS / "cxr_bert").tensors.items()
    }
    positions = "model.text_encoder.model.bert.embeddings.position_embeddings.weight"
    tensors[positions] = rng.normal(size=(40, 12)).astype(np.float32)
    tensors.pop("model.text_encoder.model.bert.embeddings.position_ids")
    picture, features = jnp.zeros((1, 56, 56, 3)), jnp.zeros((1, 12))
    model = biclip.build(NETWORK)
    shapes = architectures.shapes_of(model, picture, text_features=features)
    for name, rule in keys.biclip(3, 1).items():
        array = rng.normal(size=shapes[name]) * (0.1 if rule.layout == "linear" else 0.3)
        if name.endswith(("/scale", "/var")):
            array = 1 + np.abs(array)
        if name == "params/unet/head/kernel":
            array *= 0.01
        (source,) = rule.sources
        tensors[f"model.{source}"] = foreign(array.astype(np.float32), rule.layout)
        if source.endswith("running_var"):
            counter = source.removesuffix("running_var") + "num_batches_tracked"
            tensors[f"model.{counter}"] = np.array(3)
    return tensors


@pytest.fixture(scope="module")
def network(checkpoint, tmp_path_factory):
    base = tmp_path_factory.mktemp("biclip")
    save_file(checkpoint, base / "last.safetensors")
    # Of the tower, whose heads the arrays do not tell.
    shutil.copy(TOWERS / "cxr_bert/config.json", base)
    place = TOWERS / "cxr_bert"
    assert run("biclip", base / "last.safetensors", base / "out", "--tokenizer", place) == 0
    return base / "out"


def test_the_published_network_keeps_its_tower_inside(network, checkpoint):
    files = {str(p.relative_to(network)) for p in network.rglob("*") if p.is_file()}
    own = {"README.md", "config.json", "model.safetensors", "tokenizer/tokenizer.json"}
    assert files == own | {f"text_encoder/{name}" for name in own}
    config, variables = folder.read(network)
    assert config["model"] == NETWORK
    assert (config["kind"], config["vocab_size"]) == ("biclip", 16)
    tower = folder.read_config(network / "text_encoder")
    assert config["tower"] == folder.identity(tower)
    assert tower["kind"] == "bert"
    assert tower["model"]["num_heads"] == 2
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
def test_the_published_network_segments_with_its_tower_s_hidden_states(network):
    model, variables, processor = biclip_jax.load_model(network)
    picture = np.random.default_rng(0).integers(0, 256, (56, 56, 3)).astype(np.uint8)
    inputs = processor([picture], [SENTENCE])
    ids, mask = jnp.asarray(inputs["text_ids"]), jnp.asarray(inputs["text_mask"])
    assert ids.shape == (1, 32)
    tower = sentences.open_tower(network / "text_encoder", "bert")
    _, aux = jax.jit(tower.module.apply)({"params": tower.params}, ids, mask)
    states = [np.asarray(state) for state in aux["hidden_states"]]
    features = jnp.asarray(((states[1] + states[2] + states[-1]) / 3).mean(axis=1))
    image = jnp.asarray(inputs["image"], jnp.float32) / 255
    apply = jax.jit(lambda v, **text: model.apply(v, image, **text)[0])
    expected = apply(variables, text_features=features)
    close(apply(variables, text_ids=ids, text_mask=mask), expected, 1e-4)
    assert np.abs(apply(variables, text_features=features * 0) - expected).max() > 1e-3
    prediction = biclip_jax.load(network).predict(picture, SENTENCE)
    assert prediction.probability.std() > 0.01
    close(prediction.probability, 1 / (1 + np.exp(-np.asarray(expected)[0, ..., 0])), 1e-4)


@pytest.mark.parametrize(
    ("lost", "said"),
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
def test_a_network_without_some_array_names_it(checkpoint, tmp_path, capsys, lost, said):
    kept = {k: v for k, v in checkpoint.items() if not k.startswith(f"model.{lost}")}
    assert len(kept) < len(checkpoint)
    save_file(kept, tmp_path / "last.safetensors")
    shutil.copy(TOWERS / "cxr_bert/config.json", tmp_path)
    argv = ("biclip", tmp_path / "last.safetensors", tmp_path / "out")
    assert run(*argv, "--tokenizer", TOWERS / "cxr_bert") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_max_length_is_that_of_the_sentences(network, tmp_path):
    argv = ("biclip", network.parent / "last.safetensors", tmp_path / "out")
    assert run(*argv, "--tokenizer", TOWERS / "cxr_bert", "--max-length", 40) == 0
    _, _, processor = biclip_jax.load_model(tmp_path / "out")
    assert processor.encode([SENTENCE])["text_ids"].shape == (1, 40)


@pytest.mark.parametrize("length", [2, 0, -1, 41])
def test_a_max_length_that_the_tower_cannot_take_is_refused(network, tmp_path, capsys, length):
    argv = ("biclip", network.parent / "last.safetensors", tmp_path / "out")
    assert run(*argv, "--tokenizer", TOWERS / "cxr_bert", "--max-length", length) == 2
    said = f"--max-length {length}: expected 3 to 40 tokens"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_length_for_a_tower_alone_is_refused(tmp_path, capsys):
    assert run("bert", TOWERS / "cxr_bert", tmp_path / "out", "--max-length", "9") == 2
    assert "model.text.max_length" in capsys.readouterr().err
