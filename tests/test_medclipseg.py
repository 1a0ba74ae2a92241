"""MedCLIPSeg from config to files: training, resuming, evaluation, prediction, errors."""

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
from tests.models import numpy_reference

# Smaller than `smoke`: two blocks, one adapter, patch size 14, one upscaling.
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
PROMPT = "one large lesion, upper left."


def load_small_config(base, variant="smoke", **changes):
    fields = {**SMALL, "data.cache_dir": base / "cache", **changes}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return config_lib.load_config(f"medclipseg:{variant}", overrides)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("medclipseg")


def random_init(model, key, max_length, exclude=()):
    """Replaces `medclipseg.init`, which takes long to compile."""
    ids = jnp.zeros((1, max_length), jnp.int32)
    image = jnp.zeros((1, model.image_size, model.image_size, 3))
    return {"batch_stats": {}, **numpy_reference.noise(model, image, ids, amount=0.2)}


@pytest.fixture(scope="module")
def trained(base):
    """Returns the work directory of a finished run; tests must not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medclipseg, "init", random_init)
        train.train_and_evaluate(load_small_config(base), base / "run")
    return base / "run"


def encode_texts(config):
    texts = {"train": ["one small lesion left", "none right"]}
    return medclipseg_spec.encode_texts(config, texts, medclipseg_spec.open_encoders(config))


def checkpoint_at(workdir, step):
    """Reads the content of a checkpoint with orbax, without the training code."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        path = workdir / "checkpoints/last" / str(step)
        restored = checkpointer.restore(path.absolute(), args=items)
    return restored.state, restored.meta


def metrics_of(workdir):
    rows = writers.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def run(main, *argv):
    with pytest.raises(SystemExit) as exit_info:
        main(list(map(str, argv)))
    return exit_info.value.code


def test_run_writes_a_loadable_model_and_test_results(trained):
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
    # 32 images in batches of 8 are one epoch, which has one learning rate.
    assert [row["lr"] for row in steps] == pytest.approx([3e-4] * 4)
    model, variables, processor = biclip_jax.load_model(trained)
    assert isinstance(model, medclipseg.MedCLIPSeg)
    assert model.num_samples == 2
    assert set(variables["params"]) == {"adapters_0", "head", *medclipseg.FROZEN}
    assert processor.max_length == 24


def test_checkpoints_contain_only_trained_parameters(trained):
    state, progress = checkpoint_at(trained, 4)
    assert int(state["step"]) == 4
    assert set(state["params"]) == {"adapters_0", "head"}
    assert not state["frozen"]
    assert progress["best_step"] in (0, 4)
    names = [str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert any("opt_state" in name and "adapters_0" in name for name in names)
    assert not any(part in name for name in names for part in medclipseg.FROZEN)
    # The model folder has all parameters.
    tensors = readers.open_checkpoint(trained / "model/model.safetensors").tensors
    assert {name.split("/")[1] for name in tensors} >= {*medclipseg.FROZEN[:2], "adapters_0"}


def test_resumed_run_is_bit_identical(trained, base, tmp_path, monkeypatch):
    monkeypatch.setattr(medclipseg, "init", random_init)
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("lock", "test"))
    (workdir / "checkpoints/last/4.sha256.json").unlink()  # as after an interrupted save
    assert [path.name for path in checkpoint.complete_steps(workdir / "checkpoints/last")] == ["2"]
    train.train_and_evaluate(load_small_config(base, final_test=False), workdir)
    expected, resumed = (checkpoint_at(folder, 4) for folder in (trained, workdir))
    jax.tree.map(np.testing.assert_array_equal, expected[0], resumed[0])
    assert expected[1] == resumed[1]
    weights = "model/model.safetensors"
    assert (workdir / weights).read_bytes() == (trained / weights).read_bytes()
    assert metrics_of(workdir) == metrics_of(trained)


@pytest.mark.slow
def test_evaluation_writes_the_text_conditions(trained):
    argv = ("--workdir", trained, "--text-conditions", "original,empty", "--no-baselines")
    assert run(evaluate.main, *argv) == 0
    folder = trained / "evaluation/test"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["conditions"]) == {"original", "empty"}
    test_results = json.loads((trained / "test/results.json").read_text())
    # The noise depends only on the image, so the numbers are the same.
    for name in ("original", "empty"):
        assert results["conditions"][name] == test_results["conditions"][name]
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
def test_predictions_have_uncertainty_and_are_reproducible(trained, images, tmp_path):
    argv = (images, "--model", trained, "--prompt", PROMPT, "--output", tmp_path)
    assert run(predict.main, *argv) == 0
    kinds = ("mask", "overlay", "probability", "uncertainty")
    files = [f"{stem}_{kind}.png" for stem in "ab" for kind in kinds]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "predictions.csv"]
    plot = np.asarray(Image.open(tmp_path / "b_uncertainty.png").convert("RGB"))
    assert min(plot.shape[:2]) > 300
    assert plot.std() > 10
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    segmenter = biclip_jax.load(trained)
    assert segmenter.samples
    for row, path in zip(rows, sorted(images.iterdir()), strict=True):
        sampled = segmenter.predict_samples(path, PROMPT)
        assert float(row["mean_uncertainty_nats"]) == float(sampled.uncertainty.mean())
        assert float(row["mean_epistemic_nats"]) == float(sampled.epistemic.mean())
        assert 0 < sampled.epistemic.mean() < sampled.uncertainty.mean() < np.log(2)
        assert (sampled.epistemic <= sampled.uncertainty + 1e-6).all()
        mask, probability = (
            np.asarray(Image.open(tmp_path / f"{path.stem}_{kind}.png"))
            for kind in ("mask", "probability")
        )
        np.testing.assert_array_equal(mask, 255 * sampled.mask)
        np.testing.assert_array_equal(probability, np.rint(sampled.probability * 65535))
        np.testing.assert_array_equal(sampled.mask, sampled.probability >= 0.5)
        prediction = segmenter.predict(path, PROMPT)
        for name in ("mask", "probability", "uncertainty"):
            np.testing.assert_array_equal(getattr(prediction, name), getattr(sampled, name))
    views = segmenter.predict_views(path, PROMPT)
    assert [x.shape for x in views] == [x.shape for x in sampled]
    # An untrained model gives similar but different predictions for the views.
    assert 0 < np.abs(views.probability - sampled.probability).mean() < 0.05


@pytest.mark.slow
def test_prediction_is_the_mean_of_passes_of_the_loaded_model(trained, images):
    """Uses only `model.apply`; a single image has index 0."""
    model, variables, processor = biclip_jax.load_model(trained)
    image = np.asarray(Image.open(images / "b.png"))
    inputs = processor([image], [PROMPT])
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
    resized = Image.fromarray(inputs["image"][0])
    found = biclip_jax.load(trained).predict(np.asarray(resized), PROMPT).probability
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(np.asarray(probs), axis=0).max() > 1e-4


# --- invalid configs ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble": 2}, "ensemble: MedCLIPSeg samples instead of an ensemble"),
        (
            {"data.unlabelled": "somewhere", "data.unlabelled_ratio": 1},
            "data.unlabelled: MedCLIPSeg has no loss without masks",
        ),
        ({"model.num_layers": 3}, "have 2 and 2 blocks, and there are 3 adapters"),
    ],
)
def test_rejects_incompatible_fields(base, changes, message):
    config = load_small_config(base, **changes)
    with pytest.raises(UserError, match=f"--config: .*{message}"):
        program.build(config, 32, encode_texts(config))


@pytest.mark.parametrize("variant", ["clip", "pubmedclip"])
def test_openai_encoders_require_weights(base, variant):
    """They have a fixed vocabulary."""
    config = load_small_config(base, f"smoke,{variant}")
    with pytest.raises(
        UserError, match=rf"--config\.model\.variant: '{variant}' without .*weights"
    ):
        medclipseg_spec.open_encoders(config)


def test_rejects_max_length_above_the_positions_of_the_encoder(base):
    encoders = medclipseg_spec.open_encoders(load_small_config(base))
    encoders = encoders._replace(text={**encoders.text, "max_length": 20})
    with pytest.raises(UserError, match="max_length: 24; the text encoder has 20 positions"):
        medclipseg_spec.text_length(load_small_config(base), encoders)
    assert (
        medclipseg_spec.text_length(load_small_config(base, **{"model.max_length": 20}), encoders)
        == 20
    )


@pytest.mark.parametrize("variant", ["reference", "biomedclip", "covid19", "p25"])
def test_variants_build(base, variant, monkeypatch):
    monkeypatch.setattr(
        medclipseg,
        "init",
        lambda model, key, length, exclude: tiny.abstract_init(
            model, key, {"text_ids": jnp.zeros((1, length), jnp.int32)}
        ),
    )
    config = load_small_config(base, f"smoke,{variant}")
    built = program.build(config, 32, encode_texts(config))
    assert set(built.initial.frozen) == set(medclipseg.FROZEN)
    fields, recipe = built.model_config["model"], built.model_config
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
def test_reference_variant_trains(base):
    """Dice over rows, the released contrastive loss, dropout in the text encoder."""
    config = load_small_config(base, "smoke,reference", final_test=False)
    train.train_and_evaluate(config, base / "reference")
    rows = [row for row in metrics_of(base / "reference") if row["split"] == "train"]
    assert len(rows) == 4 and all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.slow
def test_smoke_run_learns_and_its_encoders_follow_from_the_seed(base):
    """Checkpoints do not contain the random encoders: a resumed run draws them again."""
    config = config_lib.load_config(
        "medclipseg:smoke", [f"--config.data.cache_dir={base / 'cache'}"]
    )
    train.train_and_evaluate(config, base / "smoke")
    losses = [row["loss"] for row in metrics_of(base / "smoke") if row["split"] == "train"]
    assert losses[-1] < losses[0]
    (base / "smoke/checkpoints/last/8.sha256.json").unlink()
    expected, _ = checkpoint_at(base / "smoke", 8)
    before = (base / "smoke/model/model.safetensors").read_bytes()
    train.train_and_evaluate(config, base / "smoke")
    jax.tree.map(np.testing.assert_array_equal, expected, checkpoint_at(base / "smoke", 8)[0])
    assert (base / "smoke/model/model.safetensors").read_bytes() == before
