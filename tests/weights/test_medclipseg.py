"""MedCLIPSeg's released checkpoints, and the files of its towers alone, to model folders."""

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
# all values, those that are trained, entries of the file: as published
PUBLISHED = {
    "clip": (166_987_285, 17_366_548, 919),
    "unimedclip": (214_580_757, 18_677_268, 668),
    "biomedclip": (214_579_989, 18_677_268, 667),
}


def published_names():
    """(variant, name, shape, "trained", "frozen" or "alias") of the authors' state dicts."""
    path = Path(__file__).parent.parent / "fixtures/medclipseg_names.txt.gz"
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        variant, name, shape, kind = line.split()
        yield variant, name, tuple(int(n) for n in shape.split("x") if n != "-"), kind


NAMES = tuple(published_names())


twin = functools.cache(torch_tiny_medclipseg.tiny_twin)


def save_checkpoint(folder, variant):
    """As the authors release it, with a config.json that tells the heads."""
    folder.mkdir(parents=True, exist_ok=True)
    state = torch_medclipseg.state_dict_with_aliases(twin(variant))
    rest = {"epoch": 100, "optimizer": {"state": {}}, "scheduler": {"T_max": 100}, "best_loss": 0.3}
    torch.save({"model": state, **rest}, folder / "latest.pth")
    (folder / "config.json").write_text(json.dumps(tiny.HEADS))
    return folder / "latest.pth"


def arrays(variant):
    """{released name: array}, without second names."""
    return {name: value.numpy() for name, value in twin(variant).state_dict().items()}


def opened(tensors, path="latest.pth"):
    held = {
        name: tensor.Tensor(value.shape, value.dtype, lambda value=value: value)
        for name, value in tensors.items()
    }
    return readers.Checkpoint(Path(path), "torch", held)


def save_clip_words(path):
    """A vocabulary for a CLIP's text tower: the two tokens around a sentence come last."""
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
    """{variant: model folder} of tiny checkpoints."""
    base = tmp_path_factory.mktemp("medclipseg")
    words = save_clip_words(base / "tokenizer.json")
    for variant in VARIANTS:
        source = save_checkpoint(base / f"{variant}_source", variant)
        place = words if variant == "clip" else CXR_BERT
        assert run("medclipseg", source, base / variant, "--tokenizer", place) == 0
    return {variant: base / variant for variant in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_released_checkpoint_is_taken_whole(folders, variant):
    described, variables = model_folder.read(folders[variant])
    report = described["origin"]["report"]
    assert report["fresh"] == []
    state = torch_medclipseg.state_dict_with_aliases(twin(variant))
    aliases = set(state) - set(twin(variant).state_dict())
    assert set(report["unused"]) == aliases
    assert bool(aliases) == (variant == "clip")
    ours = flatten_dict(variables, sep="/")
    assert sorted(report["loaded"]) == sorted(ours)
    assert sum(value.size for value in ours.values()) == sum(
        value.size for value in arrays(variant).values()
    )
    assert described["kind"] == "medclipseg"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_read_off_the_file(folders, variant):
    found = model_folder.read_config(folders[variant])["model"]
    expected = tiny.fields(variant, num_layers=1, num_upscales=2, num_samples=30)
    expected |= {"input": "imagenet_bgr", "resize": "opencv"}
    defaults = {"image": vars(clip.build_image_encoder(expected["image"]))}
    defaults["text"] = vars(clip.build_text_encoder(expected["text"]))
    for part in ("image", "text"):
        for name, value in found.pop(part).items():
            if name not in ("kind", "dtype"):
                assert defaults[part][name] == value, (part, name)
        expected.pop(part)
    assert found == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_arrays_go_where_they_belong(folders, variant):
    _, variables = model_folder.read(folders[variant])
    ours, theirs = variables["params"], arrays(variant)
    asked = ours["adapters_0"]["text_from_image"]
    names = "pvl_adapters.0.two_way.cross_attn_txt_to_img"
    same = np.testing.assert_array_equal
    same(asked["key"]["kernel"], theirs[f"{names}.k_proj.weight"].T)
    same(asked["norm_value"]["scale"], theirs[f"{names}.norm_v.weight"])
    same(asked["gate"], theirs[f"{names}.gate"])
    same(
        ours["adapters_0"]["image_down"]["kernel"],
        theirs["pvl_adapters.0.proj_vis_down.0.weight"].T,
    )
    same(ours["adapters_0"]["text_up"]["kernel"], theirs["pvl_adapters.0.proj_txt_up.weight"].T)
    same(
        ours["head"]["up_1"]["up"]["kernel"], theirs["upscale.1.conv1.weight"].transpose(2, 3, 0, 1)
    )
    same(
        ours["head"]["up_1"]["depthwise"], theirs["upscale.1.conv2.weight"][:, 0].transpose(1, 2, 0)
    )
    same(ours["head"]["mlp_2"]["kernel"], theirs["mask_head.4.weight"].T)
    image = ours[medclipseg.IMAGE_PARAMS]
    if variant == "biomedclip":
        same(image["class_token"], theirs["vision_model.trunk.cls_token"][0, 0])
        same(image["positions"], theirs["vision_model.trunk.pos_embed"][0])
        same(image["patches"]["bias"], theirs["vision_model.trunk.patch_embed.proj.bias"])
        kernel = theirs["vision_model.trunk.blocks.1.attn.qkv.weight"]
    else:
        same(image["projection"]["kernel"], theirs["vision_model.proj"])
        kernel = theirs["vision_model.transformer.resblocks.1.attn.in_proj_weight"]
    same(image["blocks_1"]["attention"]["qkv"]["kernel"], kernel.T)
    words = ours[medclipseg.TEXT_PARAMS]["words"]["embedding"]
    if variant == "clip":
        same(words, theirs["clip_model.token_embedding.weight"])
        same(
            ours[medclipseg.TEXT_PARAMS]["projection"]["kernel"],
            theirs["text_model.text_projection"],
        )
    else:
        same(words, theirs["text_model.transformer.embeddings.word_embeddings.weight"])
        hidden = ours[medclipseg.TEXT_PARAMS]["projection"]["hidden"]["kernel"]
        same(hidden, theirs["text_model.proj.0.weight"].T)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_folder_opens(folders, variant):
    model, variables, processor = biclip_jax.load_model(folders[variant])
    assert isinstance(model, medclipseg.MedCLIPSeg)
    assert (model.num_samples, model.input, model.layers) == (30, "imagenet_bgr", (1,))
    assert model.value_only == (variant == "clip")
    assert (processor.image_size, processor.max_length) == (tiny.IMAGE_SIZE, tiny.MAX_LENGTH)
    assert processor.resize_method == "opencv"
    assert set(variables["params"]) == {"adapters_0", "head", *medclipseg.FROZEN}


@pytest.mark.parametrize(
    ("variant", "lost"),
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
def test_a_missing_array_is_named(variant, lost):
    """One of the towers by the name that it has in their own files."""
    tensors = arrays(variant)
    del tensors[lost]
    name = re.sub(r"^(clip|text|vision)_model\.", "", lost)
    with pytest.raises(UserError, match=rf"latest\.pth: .*{re.escape(name)} is missing"):
        convert_medclipseg(opened(tensors), tiny.HEADS)


@pytest.mark.parametrize(
    "added",
    ["pvl_adapters.0.two_way.prior", "text_model.extra", "decoder.weight"],
)
def test_an_array_too_many_is_named(added):
    tensors = {**arrays("unimedclip"), added: np.zeros(3, np.float32)}
    name = added.removeprefix("text_model.")
    with pytest.raises(UserError, match=rf"{name} is of no use in this model"):
        convert_medclipseg(opened(tensors), tiny.HEADS)


def test_an_array_of_another_shape_is_named():
    tensors = arrays("clip")
    tensors["mask_head.2.weight"] = np.zeros((12, 13), np.float32)
    with pytest.raises(UserError, match=r"mask_head\.2\.weight has shape \(12, 13\)"):
        convert_medclipseg(opened(tensors), tiny.HEADS)
    tensors = {k: v for k, v in arrays("clip").items() if not k.startswith("pvl_adapters.")}
    with pytest.raises(UserError, match="there are 0 adapters"):
        convert_medclipseg(opened(tensors), tiny.HEADS)


def test_towers_alone_are_no_medclipseg():
    tensors = {k: v for k, v in arrays("clip").items() if k.startswith("vision_model")}
    with pytest.raises(UserError, match=r"no MedCLIPSeg: none of its arrays begins with pvl_adap"):
        convert_medclipseg(opened(tensors), tiny.HEADS)


def test_heads_that_are_not_64_wide_must_be_told():
    with pytest.raises(UserError, match=r"num_attention_heads is None for a width of 16; .*config"):
        convert_medclipseg(opened(arrays("biomedclip")))


# --- names and numbers at full size, without weights ---


def without_values(path, rule, sources, name, shape):
    """`convert.load`'s parameter of the right shape, all of one zero."""
    zeros = [np.broadcast_to(np.float32(0), source.shape) for source in sources]
    joined = [tables.LAYOUTS[rule.layout](value).shape for value in zeros]
    width = sum(one[-1] for one in joined) if joined[0] else 0
    made = (*joined[0][:-1], width) if joined[0] else ()
    assert made == shape, name
    return np.broadcast_to(np.float32(0), shape)


@pytest.mark.parametrize(
    "variant", ["clip", *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS[1:])]
)
def test_all_names_and_shapes_of_the_published_files_are_known(variant, monkeypatch):
    monkeypatch.setattr(tables, "_parameter", without_values)
    released = {name: (shape, kind) for of, name, shape, kind in NAMES if of == variant}
    with torch.device("meta"):
        model = torch_medclipseg.MedCLIPSeg(variant)
    state = torch_medclipseg.state_dict_with_aliases(model)
    shapes = {name: shape for name, (shape, _) in released.items()}
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes
    total, trained, entries = PUBLISHED[variant]
    assert len(released) == entries
    held = {
        name: tensor.Tensor(shape, np.dtype("float32"), lambda: np.zeros(0))
        for name, shape in shapes.items()
    }
    found = convert_medclipseg(readers.Checkpoint(Path("x.pth"), "torch", held))
    assert found.report.fresh == ()
    assert set(found.report.unused) == {n for n, (_, kind) in released.items() if kind == "alias"}
    sizes = {name: value.size for name, value in found.variables.items()}
    frozen = tuple(f"params/{name}" for name in medclipseg.FROZEN)
    own = [size for name, size in sizes.items() if not name.startswith(frozen)]
    assert (sum(sizes.values()), sum(own)) == (total, trained)
    wanted = medclipseg.ENCODERS[variant]
    for part in ("image", "text"):
        assert wanted[part].items() <= {"dropout": 0.1, **found.config[part]}.items()
    assert found.config["max_length"] == (77 if variant == "clip" else 256)


def test_every_table_row_has_one_source_of_its_own():
    table = keys.medclipseg(10, 2)
    trained = {name for of, name, _, kind in NAMES if (of, kind) == ("unimedclip", "trained")}
    assert {source for rule in table.values() for source in rule.sources} == trained
    sources = [source for rule in table.values() for source in rule.sources]
    assert len(sources) == len(set(sources)) == len(table) == 316


# --- the towers' own files ---


def tower_file(variant, prefix=""):
    """The towers under the names of their own files: OpenAI's, UniMedCLIP's, BiomedCLIP's."""
    named = {}
    for name, value in arrays(variant).items():
        if name.startswith(torch_medclipseg.TRAINABLE):
            continue
        name = name.replace("vision_model.", "visual.").replace("clip_model.", "")
        named[name.replace("text_model.", prefix)] = value
    return named


# name: (variant, what the file's arrays are called)
FILES = {
    "openai": ("clip", lambda: tower_file("clip")),
    "unimedclip text": (
        "unimedclip",
        lambda: {f"module.{k}": v for k, v in tower_file("unimedclip", "text.").items()},
    ),
    "unimedclip": (
        "unimedclip",
        lambda: {f"module.{k}": v for k, v in tower_file("unimedclip", "text_encoder.").items()},
    ),
    "biomedclip": (
        "biomedclip",
        lambda: {
            **tower_file("biomedclip", "text."),
            "text.transformer.embeddings.position_ids": np.arange(tiny.MAX_LENGTH)[None],
        },
    ),
}


@pytest.fixture(scope="module")
def tower_folders(tmp_path_factory):
    """{name of `FILES`: converted folder}."""
    base, made = tmp_path_factory.mktemp("encoders"), {}
    words = save_clip_words(base / "tokenizer.json")
    for name, (variant, tensors) in FILES.items():
        source = base / name / "source"
        source.mkdir(parents=True)
        kept = {k: np.array(v, order="C") for k, v in tensors().items()}
        save_file(kept, source / "model.safetensors")
        (source / "config.json").write_text(json.dumps(tiny.HEADS))
        place = words if variant == "clip" else CXR_BERT
        made[name] = base / name / "out"
        assert run("clip", source, made[name], "--tokenizer", place) == 0
    return made


@pytest.fixture
def small(monkeypatch):
    """The published towers are too large to make here: tiny ones pass for them."""
    small = {name: tiny.encoders(name) for name in medclipseg.ENCODERS}
    monkeypatch.setattr(medclipseg, "ENCODERS", small)


@pytest.mark.parametrize("name", FILES)
def test_a_tower_file_is_a_clip_and_the_towers_of_its_variant(tower_folders, folders, small, name):
    model, variables, _ = biclip_jax.load_model(tower_folders[name])
    assert isinstance(model, clip.CLIP)
    variant = FILES[name][0]
    encoders = clip_pair.open_folder(tower_folders[name], variant)
    assert encoders.folder == tower_folders[name]
    assert len(encoders.identity) == 64
    placed = clip_pair.rename_params(encoders.params)
    assert set(placed) == set(medclipseg.FROZEN)
    _, whole = model_folder.read(folders[variant])
    for part in medclipseg.FROZEN:
        jax.tree.map(np.testing.assert_array_equal, placed[part], whole["params"][part])
    assert variables["params"].keys() == {"image_encoder", "text_encoder", "logit_scale"}


def test_needless_arrays_of_a_tower_file_are_reported(tower_folders):
    report = model_folder.read_config(tower_folders["biomedclip"])["origin"]["report"]
    assert report["unused"] == ["transformer.embeddings.position_ids"]
    assert report["fresh"] == []


@pytest.mark.parametrize(
    ("name", "variant", "said"),
    [
        ("unimedclip", "clip", "the text tower has kind bert, that of clip has clip"),
        ("openai", "unimedclip", "the text tower has kind clip, that of unimedclip has bert"),
        (
            "openai",
            "biomedclip",
            "the image tower has stem_norm True, that of biomedclip has False",
        ),
        ("biomedclip", "unimedclip", "has stem_norm False, that of unimedclip has True"),
        ("unimedclip", "biomedclip", "has stem_norm True, that of biomedclip has False"),
    ],
)
def test_the_towers_of_another_variant_are_refused(tower_folders, small, name, variant, said):
    with pytest.raises(UserError, match=f"{said}; give other weights or another model.variant"):
        clip_pair.open_folder(tower_folders[name], variant)


@pytest.mark.parametrize("name", ["width", "patch_size", "num_layers"])
def test_towers_of_another_size_are_refused(tower_folders, small, name):
    medclipseg.ENCODERS["clip"]["image"][name] = 999
    with pytest.raises(UserError, match=rf"the image tower has {name} \d+, that of clip has 999"):
        clip_pair.open_folder(tower_folders["openai"], "clip")


def test_a_folder_without_a_clip_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match=r"convert clip SOURCE .*nowhere$"):
        clip_pair.open_folder(tmp_path / "nowhere", "clip")
    with pytest.raises(UserError, match="holds a medclipseg, not a CLIP"):
        clip_pair.open_folder(folders["clip"], "clip")
    assert run("bert", CXR_BERT, tmp_path / "bert") == 0
    with pytest.raises(UserError, match="holds a bert, not a CLIP"):
        clip_pair.open_folder(tmp_path / "bert", "unimedclip")


def test_open_clip_s_towers_are_built_with_their_activation(tmp_path):
    """timm's ViT has the exact GELU whatever the file says, and a BERT its own."""
    config = {"vision_config": {**tiny.HEADS["vision_config"], "hidden_act": "quick_gelu"}}
    config["text_config"] = {**tiny.HEADS["text_config"], "hidden_act": "quick_gelu"}
    found = architectures.convert_clip(opened(FILES["biomedclip"][1]()), config).config
    assert found["image"]["activation"] == "gelu"
    assert found["text"]["activation"] == "gelu"
    assert (found["image"]["epsilon"], found["text"]["epsilon"]) == (1e-6, 1e-12)
    model = clip.build(found)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 6), jnp.int32)
    )
    assert "norm_pre" not in shapes["params"]["image_encoder"]
    assert set(shapes["params"]["image_encoder"]["patches"]) == {"kernel", "bias"}


def test_second_names_with_other_numbers_are_refused():
    def held(*values):
        return tensor.Tensor((2,), np.dtype("float32"), lambda: np.array(values, np.float32))

    tensors = {"text_model.ln_final.bias": held(1, 2), "clip_model.ln_final.bias": held(1, 3)}
    tensors |= {"pvl_adapters.0.proj_txt_down.weight": held(0, 0)}
    with pytest.raises(UserError, match=r"clip_model\.ln_final\.bias is not the same as text_mod"):
        convert_medclipseg(readers.Checkpoint(Path("x.pth"), "torch", tensors))
