"""Whole runs: what they leave behind, exact resume, stops, policies, refusals."""

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
    """The last checkpoint's state, and how far it came."""
    return checkpoint_of(config, workdir, "last")


def checkpoint_of(config, workdir, kind):
    """State and progress of the newest checkpoint of a kind."""
    built = program.build(config, 32, sentences_of(config, workdir))
    return checkpoint.restore_latest(workdir / "checkpoints" / kind, built.initial, print)


def sentences_of(config, workdir):
    """The run's tokenizer, and one sentence."""
    tokenizer = tokenizers.load_tokenizer(workdir / "model/tokenizer")
    one = text.encode_fields(tokenizer, [""], config.model.text.max_length)
    return text_encoders.EncodedText(tokenizer, {"train": one})


def metrics_of(workdir):
    rows = writers.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


class StopAfter(checkpoint.StopSignal):
    """Stands for a signal that arrives during the n-th step."""

    count = 0

    @property
    def received(self):
        type(self).count -= 1
        return signal.SIGTERM if type(self).count == 0 else None

    @received.setter
    def received(self, value):
        pass


def test_a_run_leaves_what_it_says(trained):
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
def test_a_stopped_run_goes_on(smoke_config, trained, tmp_path, monkeypatch, stops):
    """To the same bits: stopped at step 1, at the end of an epoch, and twice within one."""
    whole, _ = final_state(smoke_config, trained)
    for steps in stops:
        monkeypatch.setattr(StopAfter, "count", steps)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(checkpoint, "StopSignal", StopAfter)
            train.train_and_evaluate(smoke_config, tmp_path / "run")
        assert stopped.value.code == 128 + signal.SIGTERM
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    resumed, _ = final_state(smoke_config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    ours = [r for r in metrics_of(tmp_path / "run") if r["split"] == "val"]
    assert ours == [r for r in metrics_of(trained) if r["split"] == "val"]


@pytest.mark.slow
def test_two_runs_are_the_same_to_the_bit(smoke_config, trained, tmp_path):
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
    assert "goes on after step 8 of 8" in capsys.readouterr().out
    assert metrics_of(tmp_path / "run") == before


def test_another_configuration_may_not_go_on_in_the_same_place(smoke_config, tmp_path):
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


def test_other_pictures_may_not_go_on_in_the_same_place(tmp_path):
    train.write_or_check_labels({"ids": ["a", "b"]}, tmp_path)
    train.write_or_check_labels({"ids": ["a", "c"]}, tmp_path)  # nothing was trained yet
    (tmp_path / "checkpoints/last/4").mkdir(parents=True)
    (tmp_path / "checkpoints/last/4.sha256.json").write_text("{}")
    train.write_or_check_labels({"ids": ["a", "c"]}, tmp_path)
    with pytest.raises(UserError, match=r"began with 2 labelled pictures; .* has 3, of which 1"):
        train.write_or_check_labels({"ids": ["a", "d", "e"]}, tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text()) == {"ids": ["a", "c"]}
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(UserError, match=r"labels.json: damaged \(KeyError\('ids'\)\)"):
        train.write_or_check_labels({"ids": ["a", "c"]}, tmp_path)


@pytest.mark.slow
def test_a_start_that_failed_does_not_hold_its_place(smoke_config, tmp_path):
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
def test_a_killed_process_goes_on_to_the_same_bits(smoke_config, trained, tmp_path):
    """SIGKILL after the first checkpoint, wherever that finds the process."""
    cache = f"--config.data.cache_dir={smoke_config.data.cache_dir}"
    command = [sys.executable, "-m", "biclip_jax.train", "--config", "default:smoke", cache]
    process = subprocess.Popen([*command, "--workdir", str(tmp_path / "run")])
    while not list((tmp_path / "run/checkpoints/last").glob("*.sha256.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run([*command, "--workdir", str(tmp_path / "run")], capture_output=True)
    assert b"goes on after step" in done.stdout
    assert done.returncode == 0
    # The command line uses faster convolutions than the run here: equal to rounding.
    first, _ = final_state(smoke_config, trained)
    second, _ = final_state(smoke_config, tmp_path / "run")
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05)
    assert int(second.step) == 8


def broken_objective(*args, **kwargs):
    """The published objective with a loss that is not a number."""
    loss, aux = PUBLISHED(*args, **kwargs)
    return loss * float("nan"), aux


PUBLISHED = biclip_spec.objective.objective


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "abort"])
def test_a_loss_that_is_not_finite_follows_the_policy(smoke_config, tmp_path, monkeypatch, policy):
    monkeypatch.setattr(biclip_spec.objective, "objective", broken_objective)
    smoke_config.optim.non_finite, smoke_config.final_test = policy, False
    if policy == "abort":
        with pytest.raises(UserError, match="not finite"):
            train.train_and_evaluate(smoke_config, tmp_path / "run")
        assert metrics_of(tmp_path / "run")[0]["skipped"] == 2
        return
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    state, _ = final_state(smoke_config, tmp_path / "run")
    encoded_text = sentences_of(smoke_config, tmp_path / "run")
    fresh = program.build(smoke_config, 32, encoded_text).initial
    assert int(state.skipped) == int(state.step) == 8
    jax.tree.map(np.testing.assert_array_equal, state.params, fresh.params)


@pytest.mark.slow
def test_early_stopping_ends_after_evaluations_without_improvement(
    smoke_config, tmp_path, monkeypatch
):
    scores = iter([0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(train, "validate", lambda *_: {"dice_global": next(scores)})
    with smoke_config.unlocked():
        smoke_config.patience, smoke_config.eval_every, smoke_config.final_test = 2, 1, False
    train.train_and_evaluate(smoke_config, tmp_path / "run")
    state, progress = final_state(smoke_config, tmp_path / "run")
    assert int(state.step) == 3
    assert (progress["best_step"], progress["stale"]) == (1, 2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.image_size=60", "image_size is 60"),
        ("batch_size=3", "batch_size is 3"),
        ("data.name=nothing", "nothing"),
        ("data.source=/nowhere", "source"),
    ],
)
def test_what_cannot_run_is_said_before_training(tmp_path, override, said):
    overrides = [f"--config.data.cache_dir={tmp_path}", f"--config.{override}"]
    overrides += ["--config.optim.accumulate=2"] if "batch" in override else []
    config = config_lib.load_config("default:smoke", overrides)
    with pytest.raises(UserError, match=said):
        train.train_and_evaluate(config, tmp_path / "run")
    if said.startswith("image_size"):  # nothing was prepared at a size that no network takes
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
def test_every_kind_of_method_runs_end_to_end(tmp_path, method):
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
    given, without = (segmenter.predict(image, text).probability for text in ("left lung", ""))
    assert np.isfinite(given).all()
    assert np.array_equal(given, without) == (method == "unet")


@pytest.mark.slow
@pytest.mark.parametrize("taught", [False, True])
def test_a_stopped_semi_supervised_run_goes_on_and_keeps_its_averages(
    trained, tmp_path, monkeypatch, taught
):
    overrides = [f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.final_test=false"]
    if taught:  # a model folder: the run has all the labels
        overrides.append(f"--config.data.teachers={trained / 'model'}")
    overrides += ["--config.data.label_fraction=0.5", "--config.num_steps=4"]
    config = config_lib.load_config("default:smoke,semi", overrides)
    train.train_and_evaluate(config, tmp_path / "whole")
    monkeypatch.setattr(StopAfter, "count", 3)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "StopSignal", StopAfter)
        train.train_and_evaluate(config, tmp_path / "run")
    monkeypatch.setattr(pseudo_labels, "open_teacher", lambda *_: pytest.fail("asked again"))
    train.train_and_evaluate(config, tmp_path / "run")
    (whole, progress), (resumed, _) = (
        final_state(config, tmp_path / name) for name in ("whole", "run")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert progress["best_step"] == 4
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), whole.params, whole.ema["params"])
    assert moved["unet"]["head"]["kernel"]
    _, variables, _ = inference.load_model(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, variables["params"], whole.ema["params"])
    labels = json.loads((tmp_path / "whole/labels.json").read_text())
    assert labels["num_images"] == 16
    rows = [row for row in metrics_of(tmp_path / "whole") if row["split"] == "train"]
    assert all(np.isfinite(row["loss_pseudo_labels"]) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", "no_text"])
def test_the_demo_needs_its_sentences(tmp_path, variant):
    """The picture alone does not determine the mask: 0.85 with sentences, below 0.6 without."""
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
def tower_folder(tmp_path_factory):
    """A converted text tower, as `python -m biclip_jax.convert bert` writes it."""
    folder = tmp_path_factory.mktemp("encoder") / "cxr_bert"
    source = Path(__file__).parent / "fixtures/encoders/cxr_bert"
    with pytest.raises(SystemExit, match="0"):
        convert.main(["bert", str(source), str(folder)])
    return folder


def with_tower(config, folder, **fields):
    with config.unlocked():
        config.model.text.encoder, config.model.text.weights = "bert", str(folder)
        config.model.text.max_length = 14
        config.model.text.update(fields)
    return config


@pytest.mark.slow
def test_a_frozen_tower_is_asked_once_and_travels_with_the_model(
    smoke_config, tower_folder, tmp_path, capsys, monkeypatch
):
    config = with_tower(smoke_config, tower_folder)
    results = train.train_and_evaluate(config, tmp_path / "run")
    assert results["conditions"]["original"]["num_images"] == 8
    assert "distinct sentences" in capsys.readouterr().out
    stored = list((tmp_path / "cache").rglob("text_features-*.safetensors"))
    assert len(stored) == 1

    # The model folder holds the tower, so that new sentences can be asked of it alone.
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "run/model", moved)
    model, variables, processor = inference.load_model(moved)
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 1)).astype(np.uint8)
    inputs = {k: jnp.asarray(v) for k, v in processor([image], ["lower left lung"]).items()}
    scaled = inputs["image"].astype(jnp.float32) / 255
    logits, _ = model.apply(variables, scaled, inputs["text_ids"], inputs["text_mask"])
    found = inference.load(moved).predict(image, "lower left lung").probability
    np.testing.assert_allclose(found, jax.nn.sigmoid(logits)[0, ..., 0], atol=1e-5)

    # Going on reads the stored vectors; another tower may not go on.
    asked_again = partial(pytest.fail, "the tower was asked again")
    monkeypatch.setattr(text_encoders, "_feature_function", lambda *_: lambda _: asked_again())
    config.final_test = False
    train.train_and_evaluate(config, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(tower_folder, other)
    described, variables = model_folder.read(other)
    variables["params"]["norm"]["bias"] += 1
    words = (other / model_folder.TOKENIZER).read_text()
    model_folder.write(other, config=described, variables=variables, tokenizer=words, card="")
    with pytest.raises(UserError, match=r"began with the text tower that lay in .*cxr_bert"):
        train.train_and_evaluate(with_tower(config, other), tmp_path / "run")

    # Nor may it take the place of the one that the model was trained with.
    shutil.rmtree(moved / "text_encoder")
    shutil.copytree(other, moved / "text_encoder")
    with pytest.raises(UserError, match="not the tower"):
        inference.load_model(moved)


@pytest.mark.slow
def test_a_trainable_tower_begins_as_converted_and_learns(smoke_config, tower_folder, tmp_path):
    config = with_tower(smoke_config, tower_folder, trainable=True, pooling="masked")
    train.train_and_evaluate(config, tmp_path / "run")
    _, before = model_folder.read(tower_folder)
    model, variables, _ = inference.load_model(tmp_path / "run")
    assert model.text_encoder.pooling == "masked"
    after = variables["params"]["text_encoder"]["pretrained"]
    before, after = (flatten_dict(tree, sep="/") for tree in (before["params"], after))
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    # The projection of [CLS] is not looked at; weight decay alone moves it.
    assert {"words/embedding", "blocks_0/attention/qkv/kernel"} <= moved
    for name in after:
        np.testing.assert_allclose(after[name], before[name], atol=0.1, err_msg=name)
