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

from biclip_jax import (
    biclip_program,
    cli,
    convert,
    image_towers,
    inference,
    parallel,
    program,
    sentences,
    train,
)
from biclip_jax.errors import UserError
from biclip_jax.evaluation import metrics
from biclip_jax.models import biclip, clip, fusion
from biclip_jax.training import checkpoint, objective
from biclip_jax.training import state as train_state
from biclip_jax.weights import folder as model_folder
from tests import tiny

TOWERS = Path(__file__).parent / "fixtures/towers"
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
    base = tmp_path_factory.mktemp("towers")
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
    released = dict(image_towers.KINDS)
    image_towers.KINDS["clip_vit_b16"] = {"kind": "vit", "patch_size": 16}
    image_towers.KINDS["clip_rn50"] = {"kind": "resnet"}
    yield released
    image_towers.KINDS.update(released)


def test_the_released_towers_alone_bear_their_names(small_towers):
    for fields, name in ((clip.VIT_B16, "clip_vit_b16"), (clip.RN50, "clip_rn50")):
        written = json.loads(json.dumps(fields))
        assert small_towers[name].items() <= written.items()
    for other in (clip.VIT_B32, clip.VIT_B16 | {"width": 1024}, clip.RN50 | {"width": 96}):
        written = json.loads(json.dumps(other))
        assert not any(kind.items() <= written.items() for kind in small_towers.values())


def opened(folder, encoder, dtype="float32"):
    return image_towers.open_configured({"encoder": encoder, "weights": str(folder)}, dtype)


def apply(tower, image):
    variables = {"params": tower.params, "batch_stats": tower.batch_stats}
    variables = jax.tree.map(jnp.asarray, variables)
    with jax.default_matmul_precision("highest"):
        return tower.module.apply(variables, jnp.asarray(image, jnp.float32))


@pytest.mark.slow
def test_a_resnet_answers_as_its_authors_do(folders):
    """Their pictures are normalised; the module takes them in [0, 1] and does that itself."""
    tower = opened(folders["resnet"], "clip_rn50")
    with np.load(TOWERS / "openai_resnet/expected.npz") as expected:
        image = expected["image"] * np.array(clip.STD) + np.array(clip.MEAN)
        np.testing.assert_allclose(apply(tower, image), expected["image_embedding"], atol=1e-4)
    assert set(tower.batch_stats) == {"tower"}
    assert tower.fields["kind"] == "resnet"
    described = model_folder.read_config(folders["resnet"])
    assert tower.identity == model_folder.identity(described)


def test_a_vit_is_its_own_tower_on_normalised_pictures(folders):
    tower = opened(folders["vit"], "clip_vit_b16")
    assert tower.batch_stats == {}
    image = np.random.default_rng(0).random((2, 32, 32, 3))
    _, variables = model_folder.read(folders["vit"])
    inner = jax.tree.map(jnp.asarray, {"params": variables["params"]["image_encoder"]})
    normal = jnp.asarray((image - np.array(clip.MEAN)) / np.array(clip.STD), jnp.float32)
    expected, _ = jax.jit(clip.build_image_encoder(VIT).apply)(inner, normal)
    np.testing.assert_allclose(apply(tower, image), expected, atol=1e-5)
    assert opened(folders["vit"], "clip_vit_b16", "bfloat16").module.tower.dtype == jnp.bfloat16


def test_pictures_of_another_size_are_resized_as_torch_does(folders):
    torch = pytest.importorskip("torch")
    tower = opened(folders["vit"], "clip_vit_b16")
    for size in (56, 20):
        image = np.random.default_rng(0).random((2, size, size, 3)).astype(np.float32)
        moved = torch.from_numpy(image).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(
            moved, size=(32, 32), mode="bilinear", antialias=True, align_corners=False
        )
        expected = apply(tower, resized.permute(0, 2, 3, 1).numpy())
        np.testing.assert_allclose(apply(tower, image), expected, atol=1e-4)


def test_the_cnn_takes_no_weights(folders):
    assert image_towers.open_configured({"encoder": "cnn", "weights": ""}, "float32") is None
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
    config = cli.load_config(f"default:{variant}", [f"--config.data.cache_dir={tmp_path}/cache"])
    with config.unlocked():
        config.model.image.update(encoder=encoder, weights=str(folders[name]), **image)
    return config, opened(folders[name], encoder)


def build(config, tower):
    texts = {"train": ["lower left lung"] * config.batch_size}
    spoken = sentences.read(config.model.text.to_dict(), texts, None)
    return spoken, program.build(config, 32, spoken, biclip_program.Towers(image=tower))


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.slow
def test_a_frozen_tower_travels_inside_the_model_folder(folders, name, tmp_path, monkeypatch):
    config, tower = configured(folders, name, tmp_path)
    monkeypatch.setattr(biclip, "init", tiny.abstract_init)
    spoken, built = build(config, tower)
    state = built.initial
    assert "image_tower" not in state.params
    jax.tree.map(np.testing.assert_array_equal, state.frozen, {"image_tower": tower.params})
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert not any("image_tower" in str(path) for path, _ in moments)

    rng = np.random.default_rng(0)
    state = state.replace(params=jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape), state.params))
    variables = jax.tree.map(partial(np.asarray, dtype=np.float32), train_state.variables_of(state))
    model_folder.write(
        tmp_path / "model",
        config=built.described,
        variables=variables,
        tokenizer=spoken.tokenizer.to_str(),
        card="",
    )
    said = json.loads((tmp_path / "model" / model_folder.CONFIG).read_text())
    assert said["model"]["image"]["weights"] == ""
    model, loaded, processor = inference.load_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    image = rng.random((2, 56, 56, 3)).astype(np.float32)
    sentence = {k: jnp.asarray(v) for k, v in processor.encode(["left lung", "lower"]).items()}
    placed = jax.tree.map(jnp.asarray, loaded)
    with jax.default_matmul_precision("highest"):
        fused = model.apply(placed, jnp.asarray(image), **sentence, method=model.fuse)
        refiner = {"params": placed["params"]["refiner"]}
        expected = fusion.TextRefiner().apply(refiner, fused.text, apply(tower, image))
    np.testing.assert_allclose(fused.refined_text, expected, atol=1e-4)


def test_a_tower_that_is_trained_is_among_the_parameters(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(biclip, "init", tiny.abstract_init)
    config, tower = configured(folders, "vit", tmp_path, trainable=True)
    config.optim.tower_learning_rate = 1e-5
    _, built = build(config, tower)
    assert built.initial.frozen == {}
    jax.tree.map(np.testing.assert_array_equal, built.initial.params["image_tower"], tower.params)


@pytest.mark.parametrize("variant", ["unet", "ef_unet", "one_way", "no_bmf"])
def test_methods_without_refinement_have_no_use_for_a_tower(folders, tmp_path, variant):
    config, tower = configured(folders, "vit", tmp_path, f"smoke,{variant}")
    with pytest.raises(UserError, match=r"model\.image\.encoder is a tower.*set cnn"):
        build(config, tower)


@pytest.mark.slow
def test_statistics_of_a_frozen_resnet_stay(folders):
    """BatchNorm inside the tower is used as at inference, whatever the U-Net's does."""
    tower = opened(folders["resnet"], "clip_rn50")
    model = tiny.model(method="ef_unet", bmf={**biclip.DEFAULTS["bmf"]}).clone(
        image_tower=tower.module
    )
    ids = jnp.zeros((1, tiny.MAX_LENGTH), jnp.int32)
    variables = tiny.abstract_init(
        model, jax.random.key(0), {"text_ids": ids, "text_mask": ids == 0}
    )
    variables["params"]["image_tower"] = jax.tree.map(jnp.asarray, tower.params)
    variables["batch_stats"]["image_tower"] = jax.tree.map(jnp.asarray, tower.batch_stats)
    state = train_state.create(variables, optax.sgd(0.1), ["image_tower"])
    recipe = tiny.recipe("ef_unet", geometry_first=False)
    bound = partial(objective.objective, model=model, recipe=recipe)
    keys = jax.random.split(jax.random.key(0), 2)
    _, (statistics, _) = jax.jit(bound)(state.params, state, tiny.batch(2), keys)
    jax.tree.map(np.testing.assert_array_equal, statistics["image_tower"], tower.batch_stats)
    moved = statistics["unet"]["encoder_0"]["norm_0"]["mean"]
    assert statistics["unet"].keys() == variables["batch_stats"]["unet"].keys()
    assert moved.shape == (2,)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [False, True])
def test_a_run_with_a_tower_is_kept_and_goes_on(folders, tmp_path, trainable):
    config, tower = configured(folders, "vit", tmp_path, trainable=trainable)
    with config.unlocked():
        config.num_steps, config.eval_every, config.final_test = 2, 2, False
        config.optim.tower_learning_rate = 1e-3 if trainable else 0.0
    train.train_and_evaluate(config, tmp_path / "run")
    texts = {"train": ["a"]}
    tokenizer = inference.load_model(tmp_path / "run")[2].tokenizer
    one = sentences.read(config.model.text.to_dict(), texts, None).fields["train"]
    spoken = sentences.Sentences(tokenizer, {"train": one})
    built = program.build(config, 32, spoken, biclip_program.Towers(image=tower))
    bare = train_state.without_frozen(built.initial)
    state, _ = checkpoint.restore_latest(tmp_path / "run/checkpoints/best", bare, print)
    state = dataclasses.replace(state, frozen=built.initial.frozen)
    model, variables, processor = inference.load_model(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, variables, train_state.variables_of(state))
    found = variables["params"]["image_tower"]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found, tower.params)
    assert jax.tree.all(same) != trainable
    # The loaded model answers as the one that was trained.
    batch = tiny.batch(4)
    sentence = {k: jnp.asarray(v) for k, v in processor.encode(["left lung"] * 4).items()}
    batch = {name: batch[name] for name in ("image", "mask", "valid")} | sentence
    placed = jax.tree.map(jnp.asarray, variables)
    logits, _ = model.apply(placed, biclip.to_unit_rgb(batch["image"]), **sentence)
    assert np.isfinite(logits).all()
    sums = metrics.overlap_sums(jax.nn.sigmoid(logits), batch["mask"], batch["valid"])
    found = built.eval_step(train_state.variables_of(state), parallel.shard(batch))
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
