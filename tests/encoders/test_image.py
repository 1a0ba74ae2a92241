"""Pretrained image towers: what opens, what it answers, how it is trained and kept."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from biclip_jax import convert, inference, train
from biclip_jax.core import config as config_lib
from biclip_jax.core import distributed
from biclip_jax.core.errors import UserError
from biclip_jax.encoders import image as image_encoders
from biclip_jax.encoders import text as text_encoders
from biclip_jax.evaluation.metrics import overlap
from biclip_jax.experiment import biclip_spec, program
from biclip_jax.models import biclip, clip, fusion
from biclip_jax.training import checkpoint
from biclip_jax.training import state as train_state
from biclip_jax.training.objectives import biclip as objective
from biclip_jax.weights import model_folder
from tests import tiny

TOWERS = Path(__file__).parent.parent / "fixtures/encoders"
VIT = {"kind": "vit", "image_size": 32, "patch_size": 16, "width": 8, "num_layers": 2}
VIT |= {"num_heads": 2, "mlp_width": 12, "embedding_size": 6}
WORDS = {"vocab_size": 60, "max_length": 9, "width": 12, "num_layers": 2, "num_heads": 1}
WORDS |= {"mlp_width": 16, "embedding_size": 6}


def words(path):
    """A tokenizer of sixty words, as CLIP's puts its two tokens around them."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    names = [f"w{i}" for i in range(58)] + [start, end]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 58), (end, 59)]
    )
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder}: a ViT with patches of 16, a ResNet, a ViT with patches of 8, a BERT."""
    base = tmp_path_factory.mktemp("encoders")
    tokenizer = words(base / "tokenizer.json")
    for name, source, kind in [
        ("resnet", "openai_resnet", "clip"),
        ("patches_of_8", "hf_clip", "clip"),
        ("bert", "cxr_bert", "bert"),
    ]:
        given = ["--tokenizer", str(tokenizer)] if name == "resnet" else []
        with pytest.raises(SystemExit) as stopped:
            convert.main([kind, str(TOWERS / source), str(base / name), *given])
        assert stopped.value.code == 0
    described = {"image": VIT, "text": WORDS}
    module = clip.build(described)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 9), jnp.int32)
    )
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    model_folder.write(
        base / "vit",
        config={"kind": "clip", "model": described},
        variables=random,
        tokenizer=tokenizer.read_text(),
        card="",
    )
    return {name: base / name for name in ("vit", "resnet", "patches_of_8", "bert")}


@pytest.fixture(autouse=True, scope="module")
def small_towers():
    """The released towers are too large to make here: these pass for them."""
    released = dict(image_encoders.EXPECTED_FIELDS)
    image_encoders.EXPECTED_FIELDS["clip_vit_b16"] = {"kind": "vit", "patch_size": 16}
    image_encoders.EXPECTED_FIELDS["clip_rn50"] = {"kind": "resnet"}
    yield released
    image_encoders.EXPECTED_FIELDS.update(released)


def test_the_released_towers_alone_bear_their_names(small_towers):
    for fields, name in ((clip.VIT_B16, "clip_vit_b16"), (clip.RN50, "clip_rn50")):
        written = json.loads(json.dumps(fields))
        assert small_towers[name].items() <= written.items()
    for other in (clip.VIT_B32, clip.VIT_B16 | {"width": 1024}, clip.RN50 | {"width": 96}):
        written = json.loads(json.dumps(other))
        assert not any(kind.items() <= written.items() for kind in small_towers.values())


def opened(folder, encoder, dtype="float32"):
    return image_encoders.open_configured({"encoder": encoder, "weights": str(folder)}, dtype)


def apply(encoder, image):
    variables = {"params": encoder.params, "batch_stats": encoder.batch_stats}
    variables = jax.tree.map(jnp.asarray, variables)
    with jax.default_matmul_precision("highest"):
        return encoder.module.apply(variables, jnp.asarray(image, jnp.float32))


@pytest.mark.slow
def test_a_resnet_answers_as_its_authors_do(folders):
    """Their pictures are normalised; the module takes them in [0, 1] and does that itself."""
    encoder = opened(folders["resnet"], "clip_rn50")
    with np.load(TOWERS / "openai_resnet/expected.npz") as expected:
        image = expected["image"] * np.array(clip.STD) + np.array(clip.MEAN)
        np.testing.assert_allclose(apply(encoder, image), expected["image_embedding"], atol=1e-4)
    assert set(encoder.batch_stats) == {"pretrained"}
    assert encoder.fields["kind"] == "resnet"
    described = model_folder.read_config(folders["resnet"])
    assert encoder.identity == model_folder.identity(described)


def test_a_vit_is_its_own_tower_on_normalised_pictures(folders):
    encoder = opened(folders["vit"], "clip_vit_b16")
    assert encoder.batch_stats == {}
    image = np.random.default_rng(0).random((2, 32, 32, 3))
    _, variables = model_folder.read(folders["vit"])
    inner = jax.tree.map(jnp.asarray, {"params": variables["params"]["image_encoder"]})
    normal = jnp.asarray((image - np.array(clip.MEAN)) / np.array(clip.STD), jnp.float32)
    expected, _ = jax.jit(clip.build_image_encoder(VIT).apply)(inner, normal)
    np.testing.assert_allclose(apply(encoder, image), expected, atol=1e-5)
    assert (
        opened(folders["vit"], "clip_vit_b16", "bfloat16").module.pretrained.dtype == jnp.bfloat16
    )


def test_pictures_of_another_size_are_resized_as_torch_does(folders):
    torch = pytest.importorskip("torch")
    encoder = opened(folders["vit"], "clip_vit_b16")
    for size in (56, 20):
        image = np.random.default_rng(0).random((2, size, size, 3)).astype(np.float32)
        moved = torch.from_numpy(image).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(
            moved, size=(32, 32), mode="bilinear", antialias=True, align_corners=False
        )
        expected = apply(encoder, resized.permute(0, 2, 3, 1).numpy())
        np.testing.assert_allclose(apply(encoder, image), expected, atol=1e-4)


def test_the_cnn_takes_no_weights(folders):
    assert image_encoders.open_configured({"encoder": "cnn", "weights": ""}, "float32") is None
    with pytest.raises(UserError, match=r"is 'cnn', which takes none; .*clip_vit_b16 or clip_rn50"):
        opened(folders["vit"], "cnn")


@pytest.mark.parametrize("path", ["", "nowhere", "tests"])
def test_without_a_tower_the_command_that_makes_one_is_named(path):
    with pytest.raises(UserError, match=rf"convert clip SOURCE {path or 'FOLDER'}$"):
        opened(path, "clip_vit_b16")


@pytest.mark.parametrize(
    ("name", "encoder", "said"),
    [
        ("vit", "clip_rn50", "holds clip .*'kind': 'vit'.*'clip_rn50'"),
        ("resnet", "clip_vit_b16", "holds clip .*'kind': 'resnet'.*'clip_vit_b16'"),
        ("patches_of_8", "clip_vit_b16", "holds clip .*'patch_size': 8.*'clip_vit_b16'"),
        ("bert", "clip_vit_b16", "holds bert .*'clip_vit_b16'"),
    ],
)
def test_another_tower_is_refused(folders, name, encoder, said):
    with pytest.raises(UserError, match=rf"{name}: {said} is .*; give another folder or another"):
        opened(folders[name], encoder)


def test_weights_that_are_not_the_described_tower_s_are_refused(folders, tmp_path):
    path = Path(shutil.copytree(folders["vit"], tmp_path / "vit"))
    described, variables = model_folder.read(path)
    del variables["params"]["image_encoder"]["class_token"]
    keep = (path / model_folder.TOKENIZER).read_text()
    model_folder.write(path, config=described, variables=variables, tokenizer=keep, card="")
    with pytest.raises(UserError, match="class_token"):
        opened(path, "clip_vit_b16")


def configured(folders, name, tmp_path, variant="smoke", **image):
    encoder = {"vit": "clip_vit_b16", "resnet": "clip_rn50"}[name]
    config = config_lib.load_config(
        f"default:{variant}", [f"--config.data.cache_dir={tmp_path}/cache"]
    )
    with config.unlocked():
        config.model.image.update(encoder=encoder, weights=str(folders[name]), **image)
    return config, opened(folders[name], encoder)


def build(config, encoder):
    texts = {"train": ["lower left lung"] * config.batch_size}
    encoded_text = text_encoders.encode_splits(config.model.text.to_dict(), texts, None)
    return encoded_text, program.build(
        config, 32, encoded_text, biclip_spec.Encoders(image=encoder)
    )


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.slow
def test_a_frozen_tower_travels_inside_the_model_folder(folders, name, tmp_path, monkeypatch):
    config, encoder = configured(folders, name, tmp_path)
    monkeypatch.setattr(biclip, "init", tiny.abstract_init)
    encoded_text, built = build(config, encoder)
    state = built.initial
    assert "pretrained_image_encoder" not in state.params
    jax.tree.map(
        np.testing.assert_array_equal, state.frozen, {"pretrained_image_encoder": encoder.params}
    )
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert not any("pretrained_image_encoder" in str(path) for path, _ in moments)

    rng = np.random.default_rng(0)
    state = state.replace(params=jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape), state.params))
    variables = jax.tree.map(
        partial(np.asarray, dtype=np.float32), train_state.inference_variables(state)
    )
    model_folder.write(
        tmp_path / "model",
        config=built.described,
        variables=variables,
        tokenizer=encoded_text.tokenizer.to_str(),
        card="",
    )
    said = json.loads((tmp_path / "model" / model_folder.CONFIG).read_text())
    assert said["model"]["image"]["weights"] == ""
    model, loaded, processor = inference.load_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    image = rng.random((2, 56, 56, 3)).astype(np.float32)
    prompt = {k: jnp.asarray(v) for k, v in processor.encode(["left lung", "lower"]).items()}
    placed = jax.tree.map(jnp.asarray, loaded)
    with jax.default_matmul_precision("highest"):
        fused = model.apply(placed, jnp.asarray(image), **prompt, method=model.fuse)
        refiner = {"params": placed["params"]["refiner"]}
        expected = fusion.TextRefiner().apply(refiner, fused.text, apply(encoder, image))
    np.testing.assert_allclose(fused.refined_text, expected, atol=1e-4)


def test_a_tower_that_is_trained_is_among_the_parameters(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(biclip, "init", tiny.abstract_init)
    config, encoder = configured(folders, "vit", tmp_path, trainable=True)
    config.optim.encoder_learning_rate = 1e-5
    _, built = build(config, encoder)
    assert built.initial.frozen == {}
    jax.tree.map(
        np.testing.assert_array_equal,
        built.initial.params["pretrained_image_encoder"],
        encoder.params,
    )


@pytest.mark.parametrize("variant", ["unet", "ef_unet", "one_way", "no_bmf"])
def test_methods_without_refinement_have_no_use_for_a_tower(folders, tmp_path, variant):
    config, encoder = configured(folders, "vit", tmp_path, f"smoke,{variant}")
    with pytest.raises(UserError, match=r"model\.image\.encoder is a tower.*set cnn"):
        build(config, encoder)


@pytest.mark.slow
def test_statistics_of_a_frozen_resnet_stay(folders):
    """BatchNorm inside the tower is used as at inference, whatever the U-Net's does."""
    encoder = opened(folders["resnet"], "clip_rn50")
    model = tiny.model(method="ef_unet", bmf={**biclip.DEFAULTS["bmf"]}).clone(
        pretrained_image_encoder=encoder.module
    )
    ids = jnp.zeros((1, tiny.MAX_LENGTH), jnp.int32)
    variables = tiny.abstract_init(
        model, jax.random.key(0), {"text_ids": ids, "text_mask": ids == 0}
    )
    variables["params"]["pretrained_image_encoder"] = jax.tree.map(jnp.asarray, encoder.params)
    variables["batch_stats"]["pretrained_image_encoder"] = jax.tree.map(
        jnp.asarray, encoder.batch_stats
    )
    state = train_state.create(variables, optax.sgd(0.1), ["pretrained_image_encoder"])
    recipe = tiny.recipe("ef_unet", geometry_first=False)
    bound = partial(objective.objective, model=model, recipe=recipe)
    keys = jax.random.split(jax.random.key(0), 2)
    _, (statistics, _) = jax.jit(bound)(state.params, state, tiny.batch(2), keys)
    jax.tree.map(
        np.testing.assert_array_equal, statistics["pretrained_image_encoder"], encoder.batch_stats
    )
    moved = statistics["unet"]["encoder_0"]["norm_0"]["mean"]
    assert statistics["unet"].keys() == variables["batch_stats"]["unet"].keys()
    assert moved.shape == (2,)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [False, True])
def test_a_run_with_a_tower_is_kept_and_goes_on(folders, tmp_path, trainable):
    config, encoder = configured(folders, "vit", tmp_path, trainable=trainable)
    with config.unlocked():
        config.num_steps, config.eval_every, config.final_test = 2, 2, False
        config.optim.encoder_learning_rate = 1e-3 if trainable else 0.0
    train.train_and_evaluate(config, tmp_path / "run")
    texts = {"train": ["a"]}
    tokenizer = inference.load_model(tmp_path / "run")[2].tokenizer
    one = text_encoders.encode_splits(config.model.text.to_dict(), texts, None).fields["train"]
    encoded_text = text_encoders.EncodedText(tokenizer, {"train": one})
    built = program.build(config, 32, encoded_text, biclip_spec.Encoders(image=encoder))
    bare = train_state.without_frozen(built.initial)
    state, _ = checkpoint.restore_latest(tmp_path / "run/checkpoints/best", bare, print)
    state = dataclasses.replace(state, frozen=built.initial.frozen)
    model, variables, processor = inference.load_model(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, variables, train_state.inference_variables(state))
    found = variables["params"]["pretrained_image_encoder"]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found, encoder.params)
    assert jax.tree.all(same) != trainable
    # The loaded model answers as the one that was trained.
    batch = tiny.batch(4)
    prompt = {k: jnp.asarray(v) for k, v in processor.encode(["left lung"] * 4).items()}
    batch = {name: batch[name] for name in ("image", "mask", "valid")} | prompt
    placed = jax.tree.map(jnp.asarray, variables)
    logits, _ = model.apply(placed, biclip.to_unit_rgb(batch["image"]), **prompt)
    assert np.isfinite(logits).all()
    sums = overlap.overlap_sums(jax.nn.sigmoid(logits), batch["mask"], batch["valid"])
    found = built.eval_step(train_state.inference_variables(state), distributed.shard_batch(batch))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3), found, sums)
    # Another tower may not take its place.
    other = tmp_path / "other"
    shutil.copytree(folders["vit"], other)
    described, changed = model_folder.read(other)
    changed["params"]["image_encoder"]["class_token"] += 1
    keep = (other / model_folder.TOKENIZER).read_text()
    model_folder.write(other, config=described, variables=changed, tokenizer=keep, card="")
    with config.unlocked():
        config.model.image.weights = str(other)
    with pytest.raises(UserError, match="began with the image tower that lay in"):
        train.train_and_evaluate(config, tmp_path / "run")
