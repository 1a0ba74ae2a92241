"""MedCLIPSeg from configuration to files: a run, its resume, evaluation, prediction, refusals."""

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

import biclip_jax
from biclip_jax import evaluate, predict, train
from biclip_jax.core import config as config_lib
from biclip_jax.core.errors import UserError
from biclip_jax.experiment import medclipseg_spec, program
from biclip_jax.models import medclipseg
from biclip_jax.training import checkpoint, writers
from biclip_jax.weights import readers
from tests import tiny
from tests.models import by_hand

# Smaller than `smoke`: two blocks, one adapter, patches of 14, one doubling of the map.
SMALL = {
    "model.encoders.patch_size": 14,
    "model.encoders.num_layers": 2,
    "model.num_layers": 1,
    "model.num_upscales": 1,
    "model.num_samples": 2,
    "num_steps": 4,
    "eval_every": 2,
    "log_every": 1,
}
SENTENCE = "one large lesion, upper left."


def configured(base, variant="smoke", **changes):
    fields = {**SMALL, "data.cache_dir": base / "cache", **changes}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return config_lib.load_config(f"medclipseg:{variant}", overrides)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("medclipseg")


def noise(model, key, max_length, without=()):
    """In the place of `medclipseg.init`, whose many draws take long to compile."""
    ids = jnp.zeros((1, max_length), jnp.int32)
    image = jnp.zeros((1, model.image_size, model.image_size, 3))
    return {"batch_stats": {}, **by_hand.noise(model, image, ids, amount=0.2)}


@pytest.fixture(scope="module")
def trained(base):
    """The work directory of one finished run: read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medclipseg, "init", noise)
        train.train_and_evaluate(configured(base), base / "run")
    return base / "run"


def spoken_of(config):
    texts = {"train": ["one small lesion left", "none right"]}
    return medclipseg_spec.encode_texts(config, texts, medclipseg_spec.open_encoders(config))


def checkpoint_at(workdir, step):
    """What a checkpoint holds, whatever the program would make of it."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        path = workdir / "checkpoints/last" / str(step)
        restored = checkpointer.restore(path.absolute(), args=items)
    return restored.state, restored.meta


def metrics_of(workdir):
    rows = writers.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def run(main, *argv):
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, argv)))
    return stopped.value.code


def test_a_run_leaves_a_model_that_opens_and_its_test(trained):
    results = json.loads((trained / "test/results.json").read_text())
    assert set(results["conditions"]) == {"original", "empty", "shuffled"}
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
    assert [row["lr"] for row in steps] == pytest.approx([3e-4] * 4)
    model, variables, processor = biclip_jax.load_model(trained)
    assert isinstance(model, medclipseg.MedCLIPSeg)
    assert model.num_samples == 2
    assert set(variables["params"]) == {"adapters_0", "head", *medclipseg.FROZEN}
    assert processor.max_length == 24


def test_checkpoints_hold_what_is_trained_alone(trained):
    state, progress = checkpoint_at(trained, 4)
    assert int(state["step"]) == 4
    assert set(state["params"]) == {"adapters_0", "head"}
    assert not state["frozen"]
    assert progress["best_step"] in (0, 4)
    names = [str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert any("opt_state" in name and "adapters_0" in name for name in names)
    assert not any(part in name for name in names for part in medclipseg.FROZEN)
    # The model, on the other hand, is whole.
    held = readers.open_checkpoint(trained / "model/model.safetensors").tensors
    assert {name.split("/")[1] for name in held} >= {*medclipseg.FROZEN[:2], "adapters_0"}


def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(trained, base, tmp_path, monkeypatch):
    monkeypatch.setattr(medclipseg, "init", noise)
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("lock", "test"))
    (workdir / "checkpoints/last/4.sha256.json").unlink()  # as if its writing was interrupted
    assert [path.name for path in checkpoint.complete_steps(workdir / "checkpoints/last")] == ["2"]
    train.train_and_evaluate(configured(base, final_test=False), workdir)
    whole, resumed = (checkpoint_at(place, 4) for place in (trained, workdir))
    jax.tree.map(np.testing.assert_array_equal, whole[0], resumed[0])
    assert whole[1] == resumed[1]
    weights = "model/model.safetensors"
    assert (workdir / weights).read_bytes() == (trained / weights).read_bytes()
    assert metrics_of(workdir) == metrics_of(trained)


@pytest.mark.slow
def test_evaluation_writes_its_conditions(trained):
    argv = ("--workdir", trained, "--text-conditions", "original,empty", "--no-baselines")
    assert run(evaluate.main, *argv) == 0
    folder = trained / "evaluation/test"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["conditions"]) == {"original", "empty"}
    tested = json.loads((trained / "test/results.json").read_text())
    # A picture's noise follows the picture: again the same numbers.
    for name in ("original", "empty"):
        assert results["conditions"][name] == tested["conditions"][name]
    with open(folder / "per_image.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 8


@pytest.fixture(scope="module")
def images(base):
    folder = base / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (70, 90)).astype(np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (64, 48, 3)).astype(np.uint8)).save(folder / "b.png")
    return folder


@pytest.mark.slow
def test_predictions_tell_their_uncertainty_and_repeat_to_the_bit(trained, images, tmp_path):
    argv = ("--workdir", trained, "--image", images, "--text", SENTENCE, "--output", tmp_path)
    assert run(predict.main, *argv) == 0
    kinds = ("mask", "overlay", "probability", "uncertainty")
    files = [f"{stem}_{kind}.png" for stem in "ab" for kind in kinds]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "predictions.csv"]
    shown = np.asarray(Image.open(tmp_path / "b_uncertainty.png").convert("RGB"))
    assert min(shown.shape[:2]) > 300
    assert shown.std() > 10
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    segmenter = biclip_jax.load(trained)
    assert segmenter.samples
    for row, picture in zip(rows, sorted(images.iterdir()), strict=True):
        again = segmenter.predict_samples(picture, SENTENCE)
        assert float(row["mean_uncertainty_nats"]) == float(again.uncertainty.mean())
        assert float(row["mean_epistemic_nats"]) == float(again.epistemic.mean())
        assert 0 < again.epistemic.mean() < again.uncertainty.mean() < np.log(2)
        assert (again.epistemic <= again.uncertainty + 1e-6).all()
        mask, probability = (
            np.asarray(Image.open(tmp_path / f"{picture.stem}_{kind}.png"))
            for kind in ("mask", "probability")
        )
        np.testing.assert_array_equal(mask, 255 * again.mask)
        np.testing.assert_array_equal(probability, np.rint(again.probability * 65535))
        np.testing.assert_array_equal(again.mask, again.probability >= 0.5)
        plain = segmenter.predict(picture, SENTENCE)
        for name in ("mask", "probability", "uncertainty"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(again, name))
    views = segmenter.predict_views(picture, SENTENCE)
    assert [x.shape for x in views] == [x.shape for x in again]
    # An untrained model answers much alike to every view, and not the same.
    assert 0 < np.abs(views.probability - again.probability).mean() < 0.05


@pytest.mark.slow
def test_a_sample_is_the_mean_of_passes_of_the_loaded_model(trained, images):
    """By `model.apply` alone; the picture stands alone, so that its number is 0."""
    model, variables, processor = biclip_jax.load_model(trained)
    picture = np.asarray(Image.open(images / "b.png"))
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
        ({"model.num_layers": 3}, "have 2 and 2 blocks, and there are 3 adapters"),
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
        medclipseg_spec.open_encoders(config)


def test_sentences_longer_than_the_tower_are_refused(base):
    encoders = medclipseg_spec.open_encoders(configured(base))
    encoders = encoders._replace(text={**encoders.text, "max_length": 20})
    with pytest.raises(UserError, match="max_length: 24; the text tower has 20 positions"):
        medclipseg_spec.text_length(configured(base), encoders)
    assert medclipseg_spec.text_length(configured(base, **{"model.max_length": 20}), encoders) == 20


@pytest.mark.parametrize("variant", ["reference", "biomedclip", "covid19", "p25"])
def test_variants_build(base, variant, monkeypatch):
    monkeypatch.setattr(
        medclipseg,
        "init",
        lambda model, key, length, without: tiny.abstract_init(
            model, key, {"text_ids": jnp.zeros((1, length), jnp.int32)}
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
def test_the_smoke_run_learns_and_its_towers_follow_from_the_seed(base):
    """They are in no checkpoint: a run that goes on draws them again."""
    config = config_lib.load_config(
        "medclipseg:smoke", [f"--config.data.cache_dir={base / 'cache'}"]
    )
    train.train_and_evaluate(config, base / "smoke")
    losses = [row["loss"] for row in metrics_of(base / "smoke") if row["split"] == "train"]
    assert losses[-1] < losses[0]
    (base / "smoke/checkpoints/last/8.sha256.json").unlink()
    whole, _ = checkpoint_at(base / "smoke", 8)
    before = (base / "smoke/model/model.safetensors").read_bytes()
    train.train_and_evaluate(config, base / "smoke")
    jax.tree.map(np.testing.assert_array_equal, whole, checkpoint_at(base / "smoke", 8)[0])
    assert (base / "smoke/model/model.safetensors").read_bytes() == before
