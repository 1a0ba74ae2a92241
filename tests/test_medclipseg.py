"""MedCLIPSeg from configuration to files: a run, its resume, evaluation, prediction, refusals."""

import csv
import json
import signal

import jax
import numpy as np
import pytest
from PIL import Image

import biclip_jax
from biclip_jax import cli, evaluate, medclipseg_program, predict, program, train
from biclip_jax.errors import UserError
from biclip_jax.models import medclipseg
from biclip_jax.training import checkpoint, writers
from biclip_jax.training import state as train_state
from tests import tiny

# Smaller than `smoke`: patches of 14, one adapter and one doubling of the map.
SMALL = {
    "model.towers.patch_size": 14,
    "model.num_layers": 1,
    "model.num_upscales": 1,
    "model.num_samples": 2,
    "num_steps": 4,
    "eval_every": 2,
    "log_every": 1,
}
SENTENCE = "one large lesion, upper left."


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


def configured(base, variant="smoke", **changes):
    fields = {**SMALL, "data.cache_dir": base / "cache", **changes}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return cli.load_config(f"medclipseg:{variant}", overrides)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("medclipseg")


@pytest.fixture(scope="module")
def trained(base):
    """The work directory of one finished run: read only."""
    train.train_and_evaluate(configured(base), base / "run")
    return base / "run"


def spoken_of(config):
    texts = {"train": ["one small lesion left", "none right"]}
    return medclipseg_program.read_sentences(config, texts, medclipseg_program.open_towers(config))


def last_checkpoint(config, workdir):
    """Of a run whose sentences are not needed: the shapes without towers are those of any words."""
    built = program.build(config, 32, spoken_of(config))
    bare = train_state.without_frozen(built.initial)
    return checkpoint.restore_latest(workdir / "checkpoints/last", bare, print)


def metrics_of(workdir):
    rows = writers.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def run(main, *argv):
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, argv)))
    return stopped.value.code


def test_a_run_leaves_a_model_that_opens_and_its_test(trained):
    results = json.loads((trained / "test/results.json").read_text())
    assert set(results["conditions"]) == {"right", "missing", "shuffled"}
    for scores in results["conditions"].values():
        assert scores["num_images"] == 8
        assert 0 <= scores["dice_mean"] <= 1
    rows = metrics_of(trained)
    steps = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in rows if row["split"] == "val"] == [2, 4]
    for row in steps:
        parts = [row[f"loss_{name}"] for name in ("dice", "bce", "contrastive")]
        assert row["loss"] == pytest.approx(np.dot([0.5, 0.5, 0.1], parts), rel=1e-4)
        assert row["skipped"] == 0
    # 32 pictures in batches of 8 are one epoch, which has one rate.
    assert {row["lr"] for row in steps} == {pytest.approx(3e-4)}
    model, variables, processor = biclip_jax.load_model(trained)
    assert isinstance(model, medclipseg.MedCLIPSeg)
    assert model.num_samples == 2
    assert set(variables["params"]) == {"adapters_0", "head", *medclipseg.FROZEN}
    assert processor.max_length == 24


def test_checkpoints_hold_what_is_trained_alone(trained, base):
    state, progress = last_checkpoint(configured(base), trained)
    assert int(state.step) == 4
    assert set(state.params) == {"adapters_0", "head"}
    assert state.frozen == {}
    assert progress["position"] is not None
    described = json.loads((trained / "checkpoints/last/4.sha256.json").read_text())
    assert described
    names = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any(part in str(path) for path in names for part in ("image_tower", "text_tower"))


def test_a_stopped_run_goes_on_to_the_same_bits(trained, base, tmp_path, monkeypatch):
    """Its towers are not kept: they are drawn again from the seed."""
    config = configured(base)
    monkeypatch.setattr(StopAfter, "count", 3)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(checkpoint, "StopSignal", StopAfter)
        train.train_and_evaluate(config, tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGTERM
    config.final_test = False
    train.train_and_evaluate(config, tmp_path / "run")
    whole, _ = last_checkpoint(config, trained)
    resumed, _ = last_checkpoint(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (trained / weights).read_bytes()
    ours = [row for row in metrics_of(tmp_path / "run") if row["split"] == "val"]
    assert ours == [row for row in metrics_of(trained) if row["split"] == "val"]


def test_evaluation_writes_its_conditions(trained):
    argv = ("--workdir", trained, "--text-conditions", "right,missing", "--no-baselines")
    assert run(evaluate.main, *argv) == 0
    folder = trained / "evaluation/test"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["conditions"]) == {"right", "missing"}
    tested = json.loads((trained / "test/results.json").read_text())
    # A picture's noise follows the picture: again the same numbers.
    for name in ("right", "missing"):
        assert results["conditions"][name] == tested["conditions"][name]
    with open(folder / "per_image.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 8


@pytest.fixture(scope="module")
def pictures(base):
    folder = base / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (70, 90)).astype(np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (64, 48, 3)).astype(np.uint8)).save(folder / "b.png")
    return folder


def test_predictions_tell_their_uncertainty_and_repeat_to_the_bit(trained, pictures, tmp_path):
    for name in ("first", "second"):
        argv = ("--workdir", trained, "--image", pictures, "--text", SENTENCE)
        assert run(predict.main, *argv, "--output", tmp_path / name) == 0
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    kinds = ("mask", "overlay", "probability", "uncertainty")
    assert files == sorted(
        ["predictions.csv", *(f"{stem}_{kind}.png" for stem in "ab" for kind in kinds)]
    )
    for file in files:
        first, second = ((tmp_path / name / file).read_bytes() for name in ("first", "second"))
        assert first == second, file
    assert Image.open(tmp_path / "first/a_mask.png").size == (90, 70)
    shown = np.asarray(Image.open(tmp_path / "first/b_uncertainty.png").convert("RGB"))
    assert min(shown.shape[:2]) > 300
    assert shown.std() > 10
    with open(tmp_path / "first/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    predictor = biclip_jax.load(trained)
    assert predictor.samples
    for row, picture in zip(rows, sorted(pictures.iterdir()), strict=True):
        sampled = predictor.predict_samples(picture, SENTENCE)
        total, part = float(row["mean_uncertainty_nats"]), float(row["mean_epistemic_nats"])
        assert total == pytest.approx(float(sampled.uncertainty.mean()), rel=1e-5)
        assert part == pytest.approx(float(sampled.epistemic.mean()), rel=1e-4, abs=1e-9)
        assert 0 < part < total <= np.log(2)
        plain = predictor.predict(picture, SENTENCE)
        for name in ("mask", "probability", "uncertainty"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(sampled, name))
        np.testing.assert_array_equal(sampled.mask, sampled.probability >= 0.5)


def test_a_sample_is_the_mean_of_passes_of_the_loaded_model(trained, pictures):
    """By `model.apply` alone; the picture stands alone, so that its number is 0."""
    model, variables, processor = biclip_jax.load_model(trained)
    picture = np.asarray(Image.open(pictures / "b.png"))
    inputs = processor([picture], [SENTENCE])
    key = jax.random.fold_in(jax.random.key(0), 0)
    apply = jax.jit(model.apply)
    probs = []
    for s in range(2):
        noise = jax.random.fold_in(key, s)[None]
        image = inputs["image"].astype(np.float32) / 255
        ids, mask = inputs["text_ids"], inputs["text_mask"]
        logits, _ = apply(variables, image, ids, mask, noise=noise)
        probs.append(jax.nn.sigmoid(logits))
    expected = np.mean(probs, 0)[0, ..., 0]
    small = Image.fromarray(inputs["image"][0])
    found = biclip_jax.load(trained).predict(np.asarray(small), SENTENCE).probability
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(np.asarray(probs), axis=0).max() > 1e-4


# --- what does not go together ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ensemble": 2}, "ensemble is for BiCLIP; MedCLIPSeg's samples are its ensemble"),
        (
            {"data.unlabelled": "somewhere", "data.unlabelled_ratio": 1},
            "data.unlabelled is for BiCLIP; MedCLIPSeg has no loss without masks",
        ),
        ({"model.num_layers": 3}, "have 3 and 3 blocks, and there are 3 adapters"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(base, changes, said):
    config = configured(base, **changes)
    with pytest.raises(UserError, match=f"--config: .*{said}"):
        program.build(config, 32, spoken_of(config))


@pytest.mark.parametrize("variant", ["clip", "pubmedclip"])
def test_openai_s_towers_need_weights(base, variant):
    """Their vocabulary is their own."""
    config = configured(base, f"smoke,{variant}")
    with pytest.raises(
        UserError, match=rf"--config\.model\.variant: '{variant}' without .*weights"
    ):
        medclipseg_program.open_towers(config)


def test_sentences_longer_than_the_tower_are_refused(base):
    towers = medclipseg_program.open_towers(configured(base))
    towers = towers._replace(text={**towers.text, "max_length": 20})
    with pytest.raises(UserError, match="max_length: 24; the text tower has 20 positions"):
        medclipseg_program.text_length(configured(base), towers)
    assert (
        medclipseg_program.text_length(configured(base, **{"model.max_length": 20}), towers) == 20
    )


@pytest.mark.parametrize("variant", ["reference", "biomedclip", "covid19", "p25"])
def test_variants_build(base, variant, monkeypatch):
    monkeypatch.setattr(
        medclipseg,
        "init",
        lambda model, key, length: tiny.abstract_init(
            model, key, {"text_ids": jax.numpy.zeros((1, length), jax.numpy.int32)}
        ),
    )
    config = configured(base, f"smoke,{variant}")
    built = program.build(config, 32, spoken_of(config))
    assert set(built.initial.frozen) == set(medclipseg.FROZEN)
    fields, recipe = built.described["model"], built.described
    assert recipe["kind"] == "medclipseg"
    assert medclipseg.build(fields).image_size == config.model.image_size
    expected = {"input": "clip", "resize": "antialiased", "dropout": 0.0, "gate_init": 0.0}
    if variant == "reference":
        expected |= {"input": "imagenet_bgr", "resize": "opencv", "dropout": 0.1}
    if variant == "covid19":
        expected |= {"gate_init": -0.02}
    found = {**fields, "dropout": fields["text"]["dropout"]}
    assert {name: found[name] for name in expected} == expected
    assert fields["image"]["stem_norm" if variant == "biomedclip" else "kind"] in (False, "vit")


@pytest.mark.slow
def test_the_reference_trains_too(base):
    """Rows' Dice, the released contrastive loss, dropout in the text tower."""
    config = configured(base, "smoke,reference", final_test=False)
    train.train_and_evaluate(config, base / "reference")
    rows = [row for row in metrics_of(base / "reference") if row["split"] == "train"]
    assert len(rows) == 4 and all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.slow
def test_the_smoke_run_takes_a_minute_and_learns(base):
    config = cli.load_config("medclipseg:smoke", [f"--config.data.cache_dir={base / 'cache'}"])
    train.train_and_evaluate(config, base / "smoke")
    losses = [row["loss"] for row in metrics_of(base / "smoke") if row["split"] == "train"]
    assert losses[-1] < losses[0]
