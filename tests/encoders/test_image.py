"""Pretrained image encoders: opening, outputs, training and saving."""

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

ENCODERS = Path(__file__).parent.parent / "fixtures/encoders"
VIT = {"kind": "vit", "image_size": 32, "patch_size": 16, "width": 8, "num_layers": 2}
VIT |= {"num_heads": 2, "mlp_width": 12, "embedding_size": 6}
WORDS = {"vocab_size": 60, "max_length": 9, "width": 12, "num_layers": 2, "num_heads": 1}
WORDS |= {"mlp_width": 16, "embedding_size": 6}


def write_tokenizer(path):
    """Writes a tokenizer of 60 words that adds start and end tokens as CLIP's does."""
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
    """{name: folder} of a ViT with patch size 16, a ResNet, a ViT with patch size 8 and a BERT."""
    base = tmp_path_factory.mktemp("encoders")
    tokenizer = write_tokenizer(base / "tokenizer.json")
    for name, source, kind in [
        ("resnet", "openai_resnet", "clip"),
        ("patches_of_8", "hf_clip", "clip"),
        ("bert", "cxr_bert", "bert"),
    ]:
        options = ["--tokenizer", str(tokenizer)] if name == "resnet" else []
        with pytest.raises(SystemExit) as stopped:
            convert.main([kind, str(ENCODERS / source), str(base / name), *options])
        assert stopped.value.code == 0
    model_config = {"image": VIT, "text": WORDS}
    module = clip.build(model_config)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 9), jnp.int32)
    )
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    model_folder.write(
        base / "vit",
        config={"kind": "clip", "model": model_config},
        variables=random,
        tokenizer=tokenizer.read_text(),
        card="",
    )
    return {name: base / name for name in ("vit", "resnet", "patches_of_8", "bert")}


@pytest.fixture(autouse=True, scope="module")
def small_encoders():
    """Accepts small encoders under the names of the released ones, which are too large."""
    released = dict(image_encoders.EXPECTED_FIELDS)
    image_encoders.EXPECTED_FIELDS["clip_vit_b16"] = {"kind": "vit", "patch_size": 16}
    image_encoders.EXPECTED_FIELDS["clip_rn50"] = {"kind": "resnet"}
    yield released
    image_encoders.EXPECTED_FIELDS.update(released)


def test_expected_fields_match_only_the_released_encoders(small_encoders):
    for fields, name in ((clip.VIT_B16, "clip_vit_b16"), (clip.RN50, "clip_rn50")):
        written = json.loads(json.dumps(fields))
        assert small_encoders[name].items() <= written.items()
    for other in (clip.VIT_B32, clip.VIT_B16 | {"width": 1024}, clip.RN50 | {"width": 96}):
        written = json.loads(json.dumps(other))
        assert not any(kind.items() <= written.items() for kind in small_encoders.values())


def opened(folder, encoder, dtype="float32"):
    return image_encoders.open_configured({"encoder": encoder, "weights": str(folder)}, dtype)


def apply(encoder, image):
    variables = {"params": encoder.params, "batch_stats": encoder.batch_stats}
    variables = jax.tree.map(jnp.asarray, variables)
    with jax.default_matmul_precision("highest"):
        return encoder.module.apply(variables, jnp.asarray(image, jnp.float32))


@pytest.mark.slow
def test_the_resnet_matches_the_original_implementation(folders):
    """The reference normalizes images beforehand; the module takes [0, 1] and normalizes itself."""
    encoder = opened(folders["resnet"], "clip_rn50")
    with np.load(ENCODERS / "openai_resnet/expected.npz") as expected:
        image = expected["image"] * np.array(clip.STD) + np.array(clip.MEAN)
        np.testing.assert_allclose(apply(encoder, image), expected["image_embedding"], atol=1e-4)
    assert set(encoder.batch_stats) == {"pretrained"}
    assert encoder.fields["kind"] == "resnet"
    model_config = model_folder.read_config(folders["resnet"])
    assert encoder.identity == model_folder.identity(model_config)


def test_the_vit_normalizes_its_input(folders):
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


def test_images_of_other_sizes_are_resized_as_in_torch(folders):
    torch = pytest.importorskip("torch")
    encoder = opened(folders["vit"], "clip_vit_b16")
    for size in (56, 20):
        image = np.random.default_rng(0).random((2, size, size, 3)).astype(np.float32)
        channels_first = torch.from_numpy(image).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(
            channels_first, size=(32, 32), mode="bilinear", antialias=True, align_corners=False
        )
        expected = apply(encoder, resized.permute(0, 2, 3, 1).numpy())
        np.testing.assert_allclose(apply(encoder, image), expected, atol=1e-4)


def test_the_cnn_accepts_no_weights(folders):
    assert image_encoders.open_configured({"encoder": "cnn", "weights": ""}, "float32") is None
    message = r"is 'cnn', which has no weights; .*clip_vit_b16 or clip_rn50"
    with pytest.raises(UserError, match=message):
        opened(folders["vit"], "cnn")


@pytest.mark.parametrize("path", ["", "nowhere", "tests"])
def test_a_missing_encoder_error_names_the_convert_command(path):
    with pytest.raises(UserError, match=rf"convert clip SOURCE {path or 'FOLDER'}$"):
        opened(path, "clip_vit_b16")


@pytest.mark.parametrize(
    ("name", "encoder", "message"),
    [
        ("vit", "clip_rn50", "found clip .*'kind': 'vit'.*'clip_rn50'"),
        ("resnet", "clip_vit_b16", "found clip .*'kind': 'resnet'.*'clip_vit_b16'"),
        ("patches_of_8", "clip_vit_b16", "found clip .*'patch_size': 8.*'clip_vit_b16'"),
        ("bert", "clip_vit_b16", "found bert .*'clip_vit_b16'"),
    ],
)
def test_rejects_another_encoder(folders, name, encoder, message):
    with pytest.raises(UserError, match=rf"{name}: {message}; change one of them"):
        opened(folders[name], encoder)


def test_rejects_weights_that_do_not_match_the_config(folders, tmp_path):
    path = Path(shutil.copytree(folders["vit"], tmp_path / "vit"))
    model_config, variables = model_folder.read(path)
    del variables["params"]["image_encoder"]["class_token"]
    tokenizer = (path / model_folder.TOKENIZER).read_text()
    model_folder.write(path, config=model_config, variables=variables, tokenizer=tokenizer, card="")
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
def test_the_model_folder_contains_a_frozen_encoder(folders, name, tmp_path, monkeypatch):
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
        config=built.model_config,
        variables=variables,
        tokenizer=encoded_text.tokenizer.to_str(),
        card="",
    )
    written = json.loads((tmp_path / "model" / model_folder.CONFIG).read_text())
    assert written["model"]["image"]["weights"] == ""
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


def test_a_trainable_encoder_is_part_of_the_parameters(folders, tmp_path, monkeypatch):
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
def test_methods_without_refinement_reject_a_pretrained_encoder(folders, tmp_path, variant):
    config, encoder = configured(folders, "vit", tmp_path, f"smoke,{variant}")
    with pytest.raises(UserError, match=r"model\.image\.encoder is pretrained.*set cnn"):
        build(config, encoder)


@pytest.mark.slow
def test_statistics_of_a_frozen_resnet_are_constant(folders):
    """BatchNorm of the encoder runs in inference mode, independent of the U-Net."""
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
    mean = statistics["unet"]["encoder_0"]["norm_0"]["mean"]
    assert statistics["unet"].keys() == variables["batch_stats"]["unet"].keys()
    assert mean.shape == (2,)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [False, True])
def test_a_run_with_an_encoder_is_saved_and_checks_the_encoder_on_resume(
    folders, tmp_path, trainable
):
    config, encoder = configured(folders, "vit", tmp_path, trainable=trainable)
    with config.unlocked():
        config.num_steps, config.eval_every, config.final_test = 2, 2, False
        config.optim.encoder_learning_rate = 1e-3 if trainable else 0.0
    train.train_and_evaluate(config, tmp_path / "run")
    texts = {"train": ["a"]}
    tokenizer = inference.load_model(tmp_path / "run")[2].tokenizer
    fields = text_encoders.encode_splits(config.model.text.to_dict(), texts, None).fields["train"]
    encoded_text = text_encoders.EncodedText(tokenizer, {"train": fields})
    built = program.build(config, 32, encoded_text, biclip_spec.Encoders(image=encoder))
    initial = train_state.without_frozen(built.initial)
    state, _ = checkpoint.restore_latest(tmp_path / "run/checkpoints/best", initial, print)
    state = dataclasses.replace(state, frozen=built.initial.frozen)
    model, variables, processor = inference.load_model(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, variables, train_state.inference_variables(state))
    params = variables["params"]["pretrained_image_encoder"]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, encoder.params)
    assert jax.tree.all(same) != trainable
    # The loaded model gives the scores of the trained one.
    batch = tiny.batch(4)
    prompt = {k: jnp.asarray(v) for k, v in processor.encode(["left lung"] * 4).items()}
    batch = {name: batch[name] for name in ("image", "mask", "valid")} | prompt
    placed = jax.tree.map(jnp.asarray, variables)
    logits, _ = model.apply(placed, biclip.to_unit_rgb(batch["image"]), **prompt)
    assert np.isfinite(logits).all()
    sums = overlap.overlap_sums(jax.nn.sigmoid(logits), batch["mask"], batch["valid"])
    expected = built.eval_step(
        train_state.inference_variables(state), distributed.shard_batch(batch)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3), expected, sums)
    # The run does not resume with another encoder.
    other = tmp_path / "other"
    shutil.copytree(folders["vit"], other)
    model_config, changed = model_folder.read(other)
    changed["params"]["image_encoder"]["class_token"] += 1
    tokenizer = (other / model_folder.TOKENIZER).read_text()
    model_folder.write(other, config=model_config, variables=changed, tokenizer=tokenizer, card="")
    with config.unlocked():
        config.model.image.weights = str(other)
    with pytest.raises(UserError, match="started with the image encoder in"):
        train.train_and_evaluate(config, tmp_path / "run")
