"""Full runs: output files, exact resume, signals, policies and invalid configs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from biclip_jax import convert, inference, train
from biclip_jax.core import config as config_lib
from biclip_jax.core.errors import UserError
from biclip_jax.data import text, tokenizers
from biclip_jax.encoders import text as text_encoders
from biclip_jax.experiment import biclip_spec, program, pseudo_labels
from biclip_jax.training import checkpoint, writers
from biclip_jax.weights import model_folder

TIMES = ("images_per_second",)


def final_state(config, workdir):
    """Returns state and progress of the last checkpoint."""
    return checkpoint_of(config, workdir, "last")


def checkpoint_of(config, workdir, kind):
    """Returns state and progress of the newest checkpoint of a kind."""
    built = program.build(config, 32, encoded_text_of(config, workdir))
    return checkpoint.restore_latest(workdir / "checkpoints" / kind, built.initial, print)


def encoded_text_of(config, workdir):
    """Returns the tokenizer of the run with one encoded prompt."""
    tokenizer = tokenizers.load_tokenizer(workdir / "model/tokenizer")
    fields = text.encode_fields(tokenizer, [""], config.model.text.max_length)
    return text_encoders.EncodedText(tokenizer, {"train": fields})


def metrics_of(workdir):
    rows = writers.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


class StopAfter(checkpoint.StopSignal):
    """Simulates a signal during the n-th step."""

    count = 0

    @property
    def received(self):
        type(self).count -= 1
        return signal.SIGTERM if type(self).count == 0 else None

    @received.setter
    def received(self, value):
        pass


def test_a_run_writes_all_files(trained):
    names = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "curves.png",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer/tokenizer.json",
        "model/README.md",
        "model/metrics.json",
        "test/results.json",
        "test/per_image.csv",
        "test/overlays.png",
    }
    assert [p.name for p in (trained / "checkpoints/best").iterdir() if p.is_dir()]
    results = json.loads((trained / "test/results.json").read_text())
    assert set(results["conditions"]) == {"original", "empty", "shuffled"}
    for scores in results["conditions"].values():
        assert scores["num_images"] == 8
        for name in ("dice_global", "iou_global", "dice_mean", "iou_mean"):
            assert 0 <= scores[name] <= 1
        assert scores["iou_global"] == pytest.approx(
            scores["dice_global"] / (2 - scores["dice_global"])
        )
    rows = metrics_of(trained)
    assert [r["step"] for r in rows if r["split"] == "val"] == [4, 8]
    assert all(np.isfinite(r["loss"]) for r in rows if r["split"] == "train")


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(1,), (4,), (2, 3)])
def test_resumes_after_a_signal(smoke_config, trained, tmp_path, monkeypatch, stops):
    """Bit-identical: stopped at step 1, at the end of an epoch, or twice within one."""
    expected, _ = final_state(smoke_config, trained)
    for steps in stops:
        monkeypatch.setattr(StopAfter, "count", steps)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(checkpoint, "StopSignal", StopAfter)
            train.train_and_evaluate(smoke_config, tmp_path / "run")
        assert stopped.value.code == 128 + signal.SIGTERM
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    resumed, _ = final_state(smoke_config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, expected, resumed)
    rows = [r for r in metrics_of(tmp_path / "run") if r["split"] == "val"]
    assert rows == [r for r in metrics_of(trained) if r["split"] == "val"]


@pytest.mark.slow
def test_two_runs_are_bit_identical(smoke_config, trained, tmp_path):
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    first, _ = final_state(smoke_config, trained)
    second, _ = final_state(smoke_config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert metrics_of(tmp_path / "run") == metrics_of(trained)
    for name in ("test/results.json", "test/per_image.csv", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.slow
def test_a_finished_run_is_tested_again_without_training(smoke_config, trained, tmp_path, capsys):
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    before = metrics_of(tmp_path / "run")
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    assert "resumes after step 8 of 8" in capsys.readouterr().out
    assert metrics_of(tmp_path / "run") == before


def test_does_not_resume_with_another_config(smoke_config, tmp_path):
    train.write_or_check_config(smoke_config, tmp_path, {})
    (tmp_path / "checkpoints/last/4").mkdir(parents=True)
    (tmp_path / "checkpoints/last/4.sha256.json").write_text("{}")
    with smoke_config.unlocked():
        smoke_config.data.source = "/moved"
        train.write_or_check_config(smoke_config, tmp_path, {})
        smoke_config.optim.learning_rate = 0.5
    with pytest.raises(UserError, match=r"optim.learning_rate \(0.002 -> 0.5\)"):
        train.write_or_check_config(smoke_config, tmp_path, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: damaged"):
        train.write_or_check_config(smoke_config, tmp_path, {})


def test_does_not_resume_with_other_images(tmp_path):
    train.write_or_check_labels({"ids": ["a", "b"]}, tmp_path)
    train.write_or_check_labels({"ids": ["a", "c"]}, tmp_path)  # nothing has been trained yet
    (tmp_path / "checkpoints/last/4").mkdir(parents=True)
    (tmp_path / "checkpoints/last/4.sha256.json").write_text("{}")
    train.write_or_check_labels({"ids": ["a", "c"]}, tmp_path)
    with pytest.raises(
        UserError, match=r"started with 2 labelled images; .* has 3, 1 of them the same"
    ):
        train.write_or_check_labels({"ids": ["a", "d", "e"]}, tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text()) == {"ids": ["a", "c"]}
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(UserError, match=r"labels.json: damaged \(KeyError\('ids'\)\)"):
        train.write_or_check_labels({"ids": ["a", "c"]}, tmp_path)


@pytest.mark.slow
def test_a_failed_start_does_not_block_the_work_directory(smoke_config, tmp_path):
    with smoke_config.unlocked():
        smoke_config.batch_size, smoke_config.final_test = 3, False
        smoke_config.optim.accumulate = 2
    with pytest.raises(UserError, match="batch_size"):
        train.train_and_evaluate(smoke_config, tmp_path / "run")
    smoke_config.batch_size, smoke_config.optim.accumulate = 8, 1
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    _, best = checkpoint_of(smoke_config, tmp_path / "run", "best")
    _, last = checkpoint_of(smoke_config, tmp_path / "run", "last")
    assert last["best_step"] == best["best_step"]


@pytest.mark.slow
def test_resumes_after_sigkill(smoke_config, trained, tmp_path):
    """Sends SIGKILL at an arbitrary time after the first checkpoint."""
    cache = f"--config.data.cache_dir={smoke_config.data.cache_dir}"
    command = [sys.executable, "-m", "biclip_jax.train", "--config", "default:smoke", cache]
    process = subprocess.Popen([*command, "--workdir", str(tmp_path / "run")])
    while not list((tmp_path / "run/checkpoints/last").glob("*.sha256.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    completed = subprocess.run([*command, "--workdir", str(tmp_path / "run")], capture_output=True)
    assert b"resumes after step" in completed.stdout
    assert completed.returncode == 0
    # The command uses faster convolutions than the run here, so rounding differs.
    first, _ = final_state(smoke_config, trained)
    second, _ = final_state(smoke_config, tmp_path / "run")
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05)
    assert int(second.step) == 8


def nan_objective(*args, **kwargs):
    """The published objective with a NaN loss."""
    loss, aux = PUBLISHED(*args, **kwargs)
    return loss * float("nan"), aux


PUBLISHED = biclip_spec.objective.objective


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "abort"])
def test_a_non_finite_loss_follows_the_policy(smoke_config, tmp_path, monkeypatch, policy):
    monkeypatch.setattr(biclip_spec.objective, "objective", nan_objective)
    smoke_config.optim.non_finite, smoke_config.final_test = policy, False
    if policy == "abort":
        with pytest.raises(UserError, match="not finite"):
            train.train_and_evaluate(smoke_config, tmp_path / "run")
        assert metrics_of(tmp_path / "run")[0]["skipped"] == 2
        return
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    state, _ = final_state(smoke_config, tmp_path / "run")
    encoded_text = encoded_text_of(smoke_config, tmp_path / "run")
    fresh = program.build(smoke_config, 32, encoded_text).initial
    assert int(state.skipped) == int(state.step) == 8
    jax.tree.map(np.testing.assert_array_equal, state.params, fresh.params)


@pytest.mark.slow
def test_early_stopping_after_evaluations_without_improvement(smoke_config, tmp_path, monkeypatch):
    scores = iter([0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(train, "validate", lambda *_: {"dice_global": next(scores)})
    with smoke_config.unlocked():
        smoke_config.patience, smoke_config.eval_every, smoke_config.final_test = 2, 1, False
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    state, progress = final_state(smoke_config, tmp_path / "run")
    assert int(state.step) == 3
    assert (progress["best_step"], progress["stale"]) == (1, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.image_size=60", "image_size is 60"),
        ("batch_size=3", "batch_size is 3"),
        ("data.name=nothing", "nothing"),
        ("data.source=/nowhere", "source"),
    ],
)
def test_rejects_invalid_configs_before_training(tmp_path, override, message):
    overrides = [f"--config.data.cache_dir={tmp_path}", f"--config.{override}"]
    overrides += ["--config.optim.accumulate=2"] if "batch" in override else []
    config = config_lib.load_config("default:smoke", overrides)
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, tmp_path / "run")
    if message.startswith("image_size"):  # rejected before the images are prepared
        assert not any(tmp_path.glob("synthetic-*"))


@pytest.mark.slow
def test_accumulation_runs_end_to_end(smoke_config, tmp_path):
    with smoke_config.unlocked():
        smoke_config.optim.accumulate, smoke_config.num_steps = 2, 2
        smoke_config.model.dtype = "bfloat16"
    results = train.train_and_evaluate(smoke_config, tmp_path / "run")
    assert results["conditions"]["original"]["num_images"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "unet", "ef_unet", "one_way", "no_generator"])
def test_every_method_runs_end_to_end(tmp_path, method):
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    config = config_lib.load_config(f"default:smoke,{method}", [cache, "--config.num_steps=2"])
    results = train.train_and_evaluate(config, tmp_path / "run")
    conditions = results["conditions"]
    assert set(conditions) == {"original", "empty", "shuffled"}
    assert conditions["original"]["num_images"] == 8
    if method == "unet":
        scores = [conditions[name]["dice_global"] for name in conditions]
        assert scores[0] == scores[1] == scores[2]
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 1)).astype(np.uint8)
    segmenter = inference.load(tmp_path / "run")
    prompted, unprompted = (
        segmenter.predict(image, prompt).probability for prompt in ("left lung", "")
    )
    assert np.isfinite(prompted).all()
    assert np.array_equal(prompted, unprompted) == (method == "unet")


@pytest.mark.slow
@pytest.mark.parametrize("has_teacher", [False, True])
def test_a_semi_supervised_run_resumes_with_its_averaged_parameters(
    trained, tmp_path, monkeypatch, has_teacher
):
    overrides = [f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.final_test=false"]
    # A model folder: the work directory would be rejected, it was trained on all labels.
    if has_teacher:
        overrides.append(f"--config.data.teachers={trained / 'model'}")
    overrides += ["--config.data.label_fraction=0.5", "--config.num_steps=4"]
    config = config_lib.load_config("default:smoke,semi", overrides)
    train.train_and_evaluate(config, tmp_path / "uninterrupted")
    monkeypatch.setattr(StopAfter, "count", 3)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "StopSignal", StopAfter)
        train.train_and_evaluate(config, tmp_path / "run")
    monkeypatch.setattr(
        pseudo_labels, "open_teacher", lambda *_: pytest.fail("teacher loaded again")
    )
    train.train_and_evaluate(config, tmp_path / "run")
    (expected, progress), (resumed, _) = (
        final_state(config, tmp_path / name) for name in ("uninterrupted", "run")
    )
    jax.tree.map(np.testing.assert_array_equal, expected, resumed)
    assert progress["best_step"] == 4
    differs = jax.tree.map(
        lambda a, b: bool((a != b).any()), expected.params, expected.ema["params"]
    )
    assert differs["unet"]["head"]["kernel"]
    _, variables, _ = inference.load_model(tmp_path / "uninterrupted")
    jax.tree.map(np.testing.assert_array_equal, variables["params"], expected.ema["params"])
    labels = json.loads((tmp_path / "uninterrupted/labels.json").read_text())
    assert labels["num_images"] == 16
    rows = [row for row in metrics_of(tmp_path / "uninterrupted") if row["split"] == "train"]
    assert all(np.isfinite(row["loss_pseudo_labels"]) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", "no_text"])
def test_the_demo_needs_its_prompts(tmp_path, variant):
    """The image does not determine the mask: Dice is above 0.85 with prompts, below 0.6 without."""
    overrides = [f"--config.data.cache_dir={tmp_path}"]
    config = config_lib.load_config(f"default:{variant}", overrides)
    conditions = train.train_and_evaluate(config, tmp_path / "run")["conditions"]
    if variant:
        assert conditions["original"]["dice_global"] < 0.6
        assert "shuffled" not in conditions
    else:
        assert conditions["original"]["dice_global"] > 0.85
        assert conditions["shuffled"]["dice_global"] < 0.5
        assert conditions["empty"]["dice_global"] < 0.6


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """Folder of a text encoder, as `biclip convert bert` writes it."""
    folder = tmp_path_factory.mktemp("encoder") / "cxr_bert"
    source = Path(__file__).parent / "fixtures/encoders/cxr_bert"
    with pytest.raises(SystemExit, match="0"):
        convert.main(["bert", str(source), str(folder)])
    return folder


def with_encoder(config, folder, **fields):
    with config.unlocked():
        config.model.text.encoder, config.model.text.weights = "bert", str(folder)
        config.model.text.max_length = 14
        config.model.text.update(fields)
    return config


@pytest.mark.slow
def test_a_frozen_encoder_is_run_once_and_stored_with_the_model(
    smoke_config, encoder_folder, tmp_path, capsys, monkeypatch
):
    config = with_encoder(smoke_config, encoder_folder)
    results = train.train_and_evaluate(config, tmp_path / "run")
    assert results["conditions"]["original"]["num_images"] == 8
    assert "distinct prompts" in capsys.readouterr().out
    stored = list((tmp_path / "cache").rglob("text_features-*.safetensors"))
    assert len(stored) == 1

    # The model folder contains the encoder and can be moved.
    folder = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "run/model", folder)
    model, variables, processor = inference.load_model(folder)
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 1)).astype(np.uint8)
    inputs = {k: jnp.asarray(v) for k, v in processor([image], ["lower left lung"]).items()}
    scaled = inputs["image"].astype(jnp.float32) / 255
    logits, _ = model.apply(variables, scaled, inputs["text_ids"], inputs["text_mask"])
    probability = inference.load(folder).predict(image, "lower left lung").probability
    np.testing.assert_allclose(probability, jax.nn.sigmoid(logits)[0, ..., 0], atol=1e-5)

    # A resumed run reads the cached features, and does not accept another encoder.
    fail = partial(pytest.fail, "the prompts were encoded again")
    monkeypatch.setattr(text_encoders, "_feature_function", lambda *_: lambda _: fail())
    config.final_test = False
    train.train_and_evaluate(config, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(encoder_folder, other)
    model_config, variables = model_folder.read(other)
    variables["params"]["norm"]["bias"] += 1
    tokenizer = (other / model_folder.TOKENIZER).read_text()
    model_folder.write(
        other, config=model_config, variables=variables, tokenizer=tokenizer, card=""
    )
    with pytest.raises(UserError, match=r"started with the text encoder in .*cxr_bert"):
        train.train_and_evaluate(with_encoder(config, other), tmp_path / "run")

    # The model folder does not accept another encoder either.
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(other, folder / "text_encoder")
    with pytest.raises(UserError, match="not the text encoder"):
        inference.load_model(folder)


@pytest.mark.slow
def test_a_trainable_encoder_starts_from_the_converted_weights(
    smoke_config, encoder_folder, tmp_path
):
    config = with_encoder(smoke_config, encoder_folder, trainable=True, pooling="masked")
    train.train_and_evaluate(config, tmp_path / "run")
    _, before = model_folder.read(encoder_folder)
    model, variables, _ = inference.load_model(tmp_path / "run")
    assert model.text_encoder.pooling == "masked"
    after = variables["params"]["text_encoder"]["pretrained"]
    before, after = (flatten_dict(tree, sep="/") for tree in (before["params"], after))
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    # The projection of [CLS] is unused; only weight decay changes it.
    assert {"words/embedding", "blocks_0/attention/qkv/kernel"} <= changed
    for name in after:
        np.testing.assert_allclose(after[name], before[name], atol=0.1, err_msg=name)
