"""Conversion of MedCLIPSeg's released checkpoints, and of its encoders' files, to model folders."""

import functools
import gzip
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from tokenizers import Tokenizer, processors
from tokenizers import models as tokenizer_models

import biclip_jax
from biclip_jax import convert
from biclip_jax.core.errors import UserError
from biclip_jax.encoders import clip_pair
from biclip_jax.models import clip, medclipseg
from biclip_jax.weights import architectures, keys, model_folder, readers
from biclip_jax.weights import convert as tables
from biclip_jax.weights.formats import tensor
from biclip_jax.weights.medclipseg import convert_medclipseg
from tests import tiny_medclipseg as tiny

torch = pytest.importorskip("torch")
from reference import torch_medclipseg
from tests import torch_tiny_medclipseg

CXR_BERT = Path(__file__).parent.parent / "fixtures/encoders/cxr_bert"
VARIANTS = ("clip", "unimedclip", "biomedclip")
# As published: number of values, number of trained values, entries of the file.
PUBLISHED = {
    "clip": (166_987_285, 17_366_548, 919),
    "unimedclip": (214_580_757, 18_677_268, 668),
    "biomedclip": (214_579_989, 18_677_268, 667),
}


def published_names():
    """Yields (variant, name, shape, "trained", "frozen" or "alias") of the released state dicts."""
    path = Path(__file__).parent.parent / "fixtures/medclipseg_names.txt.gz"
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        variant, name, shape, kind = line.split()
        yield variant, name, tuple(int(n) for n in shape.split("x") if n != "-"), kind


NAMES = tuple(published_names())


torch_model = functools.cache(torch_tiny_medclipseg.tiny_model)


def save_checkpoint(folder, variant):
    """Saves a checkpoint as released, with a config.json that has the number of heads."""
    folder.mkdir(parents=True, exist_ok=True)
    state = torch_medclipseg.state_dict_with_aliases(torch_model(variant))
    rest = {"epoch": 100, "optimizer": {"state": {}}, "scheduler": {"T_max": 100}, "best_loss": 0.3}
    torch.save({"model": state, **rest}, folder / "latest.pth")
    (folder / "config.json").write_text(json.dumps(tiny.HEADS))
    return folder / "latest.pth"


def arrays(variant):
    """Returns {released name: array}, without duplicates."""
    return {name: value.numpy() for name, value in torch_model(variant).state_dict().items()}


def as_checkpoint(tensors, path="latest.pth"):
    lazy_tensors = {
        name: tensor.Tensor(value.shape, value.dtype, lambda value=value: value)
        for name, value in tensors.items()
    }
    return readers.Checkpoint(Path(path), "torch", lazy_tensors)


def save_clip_words(path):
    """Saves a vocabulary for CLIP's text encoder, with the two boundary tokens last."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = [f"w{i}" for i in range(tiny.VOCAB_SIZE - 2)] + [start, end]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(ids, unk_token="w0"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, ids[start]), (end, ids[end])]
    )
    tokenizer.save(str(path))
    return path


def run(*argv):
    with pytest.raises(SystemExit) as stopped:
        convert.main(list(map(str, argv)))
    return stopped.value.code


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns {variant: model folder} of tiny checkpoints."""
    base = tmp_path_factory.mktemp("medclipseg")
    words = save_clip_words(base / "tokenizer.json")
    for variant in VARIANTS:
        source = save_checkpoint(base / f"{variant}_source", variant)
        tokenizer = words if variant == "clip" else CXR_BERT
        assert run("medclipseg", source, base / variant, "--tokenizer", tokenizer) == 0
    return {variant: base / variant for variant in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_released_checkpoint_is_converted_completely(folders, variant):
    model_config, variables = model_folder.read(folders[variant])
    report = model_config["origin"]["report"]
    assert report["fresh"] == []
    state = torch_medclipseg.state_dict_with_aliases(torch_model(variant))
    aliases = set(state) - set(torch_model(variant).state_dict())
    assert set(report["unused"]) == aliases
    assert bool(aliases) == (variant == "clip")
    ours = flatten_dict(variables, sep="/")
    assert sorted(report["loaded"]) == sorted(ours)
    assert sum(value.size for value in ours.values()) == sum(
        value.size for value in arrays(variant).values()
    )
    assert model_config["kind"] == "medclipseg"


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_is_derived_from_the_checkpoint(folders, variant):
    config = model_folder.read_config(folders[variant])["model"]
    expected = tiny.fields(variant, num_layers=1, num_upscales=2, num_samples=30)
    expected |= {"input": "imagenet_bgr", "resize": "opencv"}
    defaults = {"image": vars(clip.build_image_encoder(expected["image"]))}
    defaults["text"] = vars(clip.build_text_encoder(expected["text"]))
    for part in ("image", "text"):
        for name, value in config.pop(part).items():
            if name not in ("kind", "dtype"):
                assert defaults[part][name] == value, (part, name)
        expected.pop(part)
    assert config == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_have_the_values_of_the_checkpoint(folders, variant):
    _, variables = model_folder.read(folders[variant])
    ours, theirs = variables["params"], arrays(variant)
    attention = ours["adapters_0"]["text_from_image"]
    names = "pvl_adapters.0.two_way.cross_attn_txt_to_img"
    assert_same = np.testing.assert_array_equal
    assert_same(attention["key"]["kernel"], theirs[f"{names}.k_proj.weight"].T)
    assert_same(attention["norm_value"]["scale"], theirs[f"{names}.norm_v.weight"])
    assert_same(attention["gate"], theirs[f"{names}.gate"])
    assert_same(
        ours["adapters_0"]["image_down"]["kernel"],
        theirs["pvl_adapters.0.proj_vis_down.0.weight"].T,
    )
    assert_same(
        ours["adapters_0"]["text_up"]["kernel"], theirs["pvl_adapters.0.proj_txt_up.weight"].T
    )
    assert_same(
        ours["head"]["up_1"]["up"]["kernel"], theirs["upscale.1.conv1.weight"].transpose(2, 3, 0, 1)
    )
    assert_same(
        ours["head"]["up_1"]["depthwise"], theirs["upscale.1.conv2.weight"][:, 0].transpose(1, 2, 0)
    )
    assert_same(ours["head"]["mlp_2"]["kernel"], theirs["mask_head.4.weight"].T)
    image = ours[medclipseg.IMAGE_PARAMS]
    if variant == "biomedclip":
        assert_same(image["class_token"], theirs["vision_model.trunk.cls_token"][0, 0])
        assert_same(image["positions"], theirs["vision_model.trunk.pos_embed"][0])
        assert_same(image["patches"]["bias"], theirs["vision_model.trunk.patch_embed.proj.bias"])
        kernel = theirs["vision_model.trunk.blocks.1.attn.qkv.weight"]
    else:
        assert_same(image["projection"]["kernel"], theirs["vision_model.proj"])
        kernel = theirs["vision_model.transformer.resblocks.1.attn.in_proj_weight"]
    assert_same(image["blocks_1"]["attention"]["qkv"]["kernel"], kernel.T)
    words = ours[medclipseg.TEXT_PARAMS]["words"]["embedding"]
    if variant == "clip":
        assert_same(words, theirs["clip_model.token_embedding.weight"])
        assert_same(
            ours[medclipseg.TEXT_PARAMS]["projection"]["kernel"],
            theirs["text_model.text_projection"],
        )
    else:
        assert_same(words, theirs["text_model.transformer.embeddings.word_embeddings.weight"])
        hidden = ours[medclipseg.TEXT_PARAMS]["projection"]["hidden"]["kernel"]
        assert_same(hidden, theirs["text_model.proj.0.weight"].T)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loads_a_converted_folder(folders, variant):
    model, variables, processor = biclip_jax.load_model(folders[variant])
    assert isinstance(model, medclipseg.MedCLIPSeg)
    assert (model.num_samples, model.input, model.layers) == (30, "imagenet_bgr", (1,))
    assert model.value_only == (variant == "clip")
    assert (processor.image_size, processor.max_length) == (tiny.IMAGE_SIZE, tiny.MAX_LENGTH)
    assert processor.resize_method == "opencv"
    assert set(variables["params"]) == {"adapters_0", "head", *medclipseg.FROZEN}


@pytest.mark.parametrize(
    ("variant", "removed"),
    [
        ("clip", "pvl_adapters.0.two_way.cross_attn_img_to_txt.gate"),
        ("unimedclip", "mask_head.2.weight"),
        ("biomedclip", "upscale.1.norm.bias"),
        ("clip", "logit_scale"),
        ("clip", "clip_model.token_embedding.weight"),
        ("clip", "text_model.ln_final.weight"),
        ("unimedclip", "text_model.proj.2.weight"),
        ("unimedclip", "text_model.transformer.encoder.layer.1.output.dense.bias"),
        ("biomedclip", "vision_model.trunk.norm.bias"),
    ],
)
def test_error_names_a_missing_array(variant, removed):
    """Arrays of the encoders are named as in the encoders' files."""
    tensors = arrays(variant)
    del tensors[removed]
    name = re.sub(r"^(clip|text|vision)_model\.", "", removed)
    with pytest.raises(UserError, match=rf"latest\.pth: .*{re.escape(name)} is missing"):
        convert_medclipseg(as_checkpoint(tensors), tiny.HEADS)


@pytest.mark.parametrize(
    "added",
    ["pvl_adapters.0.two_way.prior", "text_model.extra", "decoder.weight"],
)
def test_error_names_an_unexpected_array(added):
    tensors = {**arrays("unimedclip"), added: np.zeros(3, np.float32)}
    name = added.removeprefix("text_model.")
    with pytest.raises(UserError, match=rf"{name} is not used by this model"):
        convert_medclipseg(as_checkpoint(tensors), tiny.HEADS)


def test_error_names_an_array_of_the_wrong_shape():
    tensors = arrays("clip")
    tensors["mask_head.2.weight"] = np.zeros((12, 13), np.float32)
    with pytest.raises(UserError, match=r"mask_head\.2\.weight has shape \(12, 13\)"):
        convert_medclipseg(as_checkpoint(tensors), tiny.HEADS)
    tensors = {k: v for k, v in arrays("clip").items() if not k.startswith("pvl_adapters.")}
    with pytest.raises(UserError, match="there are 0 adapters"):
        convert_medclipseg(as_checkpoint(tensors), tiny.HEADS)


def test_rejects_encoders_without_adapters():
    tensors = {k: v for k, v in arrays("clip").items() if k.startswith("vision_model")}
    with pytest.raises(UserError, match=r"not a MedCLIPSeg: no array name begins with pvl_adap"):
        convert_medclipseg(as_checkpoint(tensors), tiny.HEADS)


def test_other_head_sizes_require_a_config():
    with pytest.raises(UserError, match=r"num_attention_heads is None for a width of 16; .*config"):
        convert_medclipseg(as_checkpoint(arrays("biomedclip")))


# --- names and numbers at full size, without weights ---


def without_values(path, rule, sources, name, shape):
    """Replaces `convert._read_parameter`: checks the shape and returns zeros without memory."""
    zeros = [np.broadcast_to(np.float32(0), source.shape) for source in sources]
    shapes = [tables.LAYOUTS[rule.layout](value).shape for value in zeros]
    width = sum(part[-1] for part in shapes) if shapes[0] else 0
    joined = (*shapes[0][:-1], width) if shapes[0] else ()
    assert joined == shape, name
    return np.broadcast_to(np.float32(0), shape)


@pytest.mark.parametrize(
    "variant", ["clip", *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS[1:])]
)
def test_converts_all_names_and_shapes_of_the_published_files(variant, monkeypatch):
    monkeypatch.setattr(tables, "_read_parameter", without_values)
    released = {name: (shape, kind) for owner, name, shape, kind in NAMES if owner == variant}
    with torch.device("meta"):
        model = torch_medclipseg.MedCLIPSeg(variant)
    state = torch_medclipseg.state_dict_with_aliases(model)
    shapes = {name: shape for name, (shape, _) in released.items()}
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes
    total, trained, entries = PUBLISHED[variant]
    assert len(released) == entries
    lazy_tensors = {
        name: tensor.Tensor(shape, np.dtype("float32"), lambda: np.zeros(0))
        for name, shape in shapes.items()
    }
    converted = convert_medclipseg(readers.Checkpoint(Path("x.pth"), "torch", lazy_tensors))
    assert converted.report.fresh == ()
    assert set(converted.report.unused) == {
        n for n, (_, kind) in released.items() if kind == "alias"
    }
    sizes = {name: value.size for name, value in converted.variables.items()}
    frozen = tuple(f"params/{name}" for name in medclipseg.FROZEN)
    trained_sizes = [size for name, size in sizes.items() if not name.startswith(frozen)]
    assert (sum(sizes.values()), sum(trained_sizes)) == (total, trained)
    published = medclipseg.ENCODERS[variant]
    for part in ("image", "text"):
        assert published[part].items() <= {"dropout": 0.1, **converted.config[part]}.items()
    assert converted.config["max_length"] == (77 if variant == "clip" else 256)


def test_every_table_row_has_its_own_source():
    table = keys.medclipseg(10, 2)
    trained = {name for owner, name, _, kind in NAMES if (owner, kind) == ("unimedclip", "trained")}
    assert {source for rule in table.values() for source in rule.sources} == trained
    sources = [source for rule in table.values() for source in rule.sources]
    assert len(sources) == len(set(sources)) == len(table) == 316


# --- files of the encoders ---


def encoder_file(variant, prefix=""):
    """Returns the encoders with the names in OpenAI's, UniMedCLIP's and BiomedCLIP's files."""
    named = {}
    for name, value in arrays(variant).items():
        if name.startswith(torch_medclipseg.TRAINABLE):
            continue
        name = name.replace("vision_model.", "visual.").replace("clip_model.", "")
        named[name.replace("text_model.", prefix)] = value
    return named


# name: (variant, function to the arrays of the file)
FILES = {
    "openai": ("clip", lambda: encoder_file("clip")),
    "unimedclip text": (
        "unimedclip",
        lambda: {f"module.{k}": v for k, v in encoder_file("unimedclip", "text.").items()},
    ),
    "unimedclip": (
        "unimedclip",
        lambda: {f"module.{k}": v for k, v in encoder_file("unimedclip", "text_encoder.").items()},
    ),
    "biomedclip": (
        "biomedclip",
        lambda: {
            **encoder_file("biomedclip", "text."),
            "text.transformer.embeddings.position_ids": np.arange(tiny.MAX_LENGTH)[None],
        },
    ),
}


@pytest.fixture(scope="module")
def encoder_folders(tmp_path_factory):
    """Returns {name of `FILES`: converted folder}."""
    base, folders = tmp_path_factory.mktemp("encoders"), {}
    words = save_clip_words(base / "tokenizer.json")
    for name, (variant, tensors) in FILES.items():
        source = base / name / "source"
        source.mkdir(parents=True)
        contiguous = {k: np.array(v, order="C") for k, v in tensors().items()}
        save_file(contiguous, source / "model.safetensors")
        (source / "config.json").write_text(json.dumps(tiny.HEADS))
        tokenizer = words if variant == "clip" else CXR_BERT
        folders[name] = base / name / "out"
        assert run("clip", source, folders[name], "--tokenizer", tokenizer) == 0
    return folders


@pytest.fixture
def small(monkeypatch):
    """Replaces the published encoders, which are too large for this test, by tiny ones."""
    small = {name: tiny.encoders(name) for name in medclipseg.ENCODERS}
    monkeypatch.setattr(medclipseg, "ENCODERS", small)


@pytest.mark.parametrize("name", FILES)
def test_an_encoder_file_is_a_clip_and_the_encoders_of_its_variant(
    encoder_folders, folders, small, name
):
    model, variables, _ = biclip_jax.load_model(encoder_folders[name])
    assert isinstance(model, clip.CLIP)
    variant = FILES[name][0]
    encoders = clip_pair.open_folder(encoder_folders[name], variant)
    assert encoders.folder == encoder_folders[name]
    assert len(encoders.identity) == 64
    renamed = clip_pair.rename_params(encoders.params)
    assert set(renamed) == set(medclipseg.FROZEN)
    _, expected = model_folder.read(folders[variant])
    for part in medclipseg.FROZEN:
        jax.tree.map(np.testing.assert_array_equal, renamed[part], expected["params"][part])
    assert variables["params"].keys() == {"image_encoder", "text_encoder", "logit_scale"}


def test_unused_arrays_of_an_encoder_file_are_reported(encoder_folders):
    report = model_folder.read_config(encoder_folders["biomedclip"])["origin"]["report"]
    assert report["unused"] == ["transformer.embeddings.position_ids"]
    assert report["fresh"] == []


@pytest.mark.parametrize(
    ("name", "variant", "message"),
    [
        ("unimedclip", "clip", "found kind bert in the text encoder, expected clip for clip"),
        (
            "openai",
            "unimedclip",
            "found kind clip in the text encoder, expected bert for unimedclip",
        ),
        (
            "openai",
            "biomedclip",
            "found stem_norm True in the image encoder, expected False for biomedclip",
        ),
        (
            "biomedclip",
            "unimedclip",
            "found stem_norm False in the image encoder, expected True for unimedclip",
        ),
        (
            "unimedclip",
            "biomedclip",
            "found stem_norm True in the image encoder, expected False for biomedclip",
        ),
    ],
)
def test_rejects_the_encoders_of_another_variant(encoder_folders, small, name, variant, message):
    with pytest.raises(UserError, match=f"{message}; change the weights or model.variant"):
        clip_pair.open_folder(encoder_folders[name], variant)


@pytest.mark.parametrize("name", ["width", "patch_size", "num_layers"])
def test_rejects_encoders_of_another_size(encoder_folders, small, name):
    medclipseg.ENCODERS["clip"]["image"][name] = 999
    with pytest.raises(
        UserError, match=rf"found {name} \d+ in the image encoder, expected 999 for clip"
    ):
        clip_pair.open_folder(encoder_folders["openai"], "clip")


def test_rejects_a_folder_without_a_clip(folders, tmp_path):
    with pytest.raises(UserError, match=r"convert clip SOURCE .*nowhere$"):
        clip_pair.open_folder(tmp_path / "nowhere", "clip")
    with pytest.raises(UserError, match="found a medclipseg, expected a CLIP"):
        clip_pair.open_folder(folders["clip"], "clip")
    assert run("bert", CXR_BERT, tmp_path / "bert") == 0
    with pytest.raises(UserError, match="found a bert, expected a CLIP"):
        clip_pair.open_folder(tmp_path / "bert", "unimedclip")


def test_encoders_in_open_clip_have_their_own_activation(tmp_path):
    """timm's ViT uses the exact GELU and a BERT its own activation, regardless of the config."""
    config = {"vision_config": {**tiny.HEADS["vision_config"], "hidden_act": "quick_gelu"}}
    config["text_config"] = {**tiny.HEADS["text_config"], "hidden_act": "quick_gelu"}
    config = architectures.convert_clip(as_checkpoint(FILES["biomedclip"][1]()), config).config
    assert config["image"]["activation"] == "gelu"
    assert config["text"]["activation"] == "gelu"
    assert (config["image"]["epsilon"], config["text"]["epsilon"]) == (1e-6, 1e-12)
    model = clip.build(config)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 6), jnp.int32)
    )
    assert "norm_pre" not in shapes["params"]["image_encoder"]
    assert set(shapes["params"]["image_encoder"]["patches"]) == {"kernel", "bias"}


def test_rejects_duplicates_with_different_values():
    def lazy(*values):
        return tensor.Tensor((2,), np.dtype("float32"), lambda: np.array(values, np.float32))

    tensors = {"text_model.ln_final.bias": lazy(1, 2), "clip_model.ln_final.bias": lazy(1, 3)}
    tensors |= {"pvl_adapters.0.proj_txt_down.weight": lazy(0, 0)}
    with pytest.raises(UserError, match=r"clip_model\.ln_final\.bias is not the same as text_mod"):
        convert_medclipseg(readers.Checkpoint(Path("x.pth"), "torch", tensors))
