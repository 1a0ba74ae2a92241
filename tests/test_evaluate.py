"""The evaluate command."""

import csv
import dataclasses
import json
import shutil
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from biclip_jax import evaluate, train
from biclip_jax.core.errors import UserError
from biclip_jax.data.annotations import VARIANTS
from biclip_jax.evaluation import arguments
from biclip_jax.evaluation.robustness import text_conditions
from biclip_jax.weights import model_folder
from tests.evaluation import test_runner as stub


def run(*argv):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(list(argv))
    return stopped.value.code


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """Work directory of a run whose model is the stub predictor of test_runner."""
    workdir = tmp_path / "run of mine"
    (workdir / "model").mkdir(parents=True)
    (workdir / "config.json").write_text('{"data": {"name": "known"}, "seed": 0}')
    write_model_config(workdir)

    def open_stub(args, config):
        splits = dict.fromkeys(("train", "val", "test"), stub.RECORDS)
        return evaluate.Evaluation(
            make=lambda corruption=None: stub.predict,
            predict=stub.predict,
            members=[],
            samples=None,
            num_samples=None,
            encode=stub.encode,
            splits=splits,
            records=text_conditions.subset(splits[args.split], args.subset),
            folder=evaluate._output(args),
        )

    monkeypatch.setattr(evaluate, "_open", open_stub)
    return workdir


def write_model_config(workdir, **changes):
    """Writes the model's config.json."""
    hashes = {"sha256": "a", "tokenizer_sha256": "b"}
    config = {"format": model_folder.FORMAT, **hashes, "step": 7, **changes}
    (workdir / "model/config.json").write_text(json.dumps(config))


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_second_call_adds_sections(untrained):
    argv, folder = ("--workdir", str(untrained)), untrained / "evaluation/test"
    assert run(*argv, "--corruptions", "gamma", "--severities", "2", "--flip-consistency") == 0
    first = results_of(folder)
    assert first["model_sha256"] == "a" and first["best_step"] == 7
    columns = (folder / "per_image.csv").read_text().splitlines()[0].split(",")
    assert run(*argv, "--text-conditions", "original", "--no-baselines", "--calibration") == 0
    second = results_of(folder)
    for name in ("corruptions", "flip_consistency", "baselines", "conditions", "unavailable"):
        assert second[name] == first[name]
    assert "calibration" in second and "calibration" not in first
    columns_after = (folder / "per_image.csv").read_text().splitlines()[0].split(",")
    assert sorted(columns_after) == sorted(columns)
    assert second["command"] != first["command"]
    assert second["previous_commands"] == [first["command"]]
    assert run(*argv, "--corruptions", "gamma", "--severities", "4") == 0
    assert set(results_of(folder)["corruptions"]["gamma"]) == {"2", "4"}


def test_results_of_another_model_are_replaced(untrained):
    argv, folder = ("--workdir", str(untrained)), untrained / "evaluation/test"
    assert run(*argv, "--flip-consistency") == 0
    write_model_config(untrained, sha256="c")
    assert run(*argv, "--no-baselines", "--text-conditions", "original") == 0
    results = results_of(folder)
    assert set(results["conditions"]) == {"original"} and results["model_sha256"] == "c"
    assert not {"flip_consistency", "baselines", "previous_commands"} & set(results)


def test_a_subset_has_its_own_folder_and_the_shuffled_prompts_of_the_split(untrained):
    argv = ("--workdir", str(untrained), "--no-baselines")
    assert run(*argv) == 0
    full_split = (untrained / "evaluation/test/results.json").read_bytes()
    assert run(*argv, "--subset", "3") == 0
    assert (untrained / "evaluation/test/results.json").read_bytes() == full_split
    assert results_of(untrained / "evaluation/test-3")["subset"] == 3
    # The subset has one prompt, the split two: shuffled prompts come from the split.
    assert run(*argv, "--subset", "1") == 0
    assert results_of(untrained / "evaluation/test-1")["conditions"]["shuffled"]["num_images"] == 1


def test_the_recorded_command_is_quoted_for_a_shell(untrained):
    assert run("--workdir", str(untrained), "--no-baselines") == 0
    command = results_of(untrained / "evaluation/test")["command"]
    assert command == f"python -m biclip_jax.evaluate --workdir '{untrained}' --no-baselines"


def test_rejects_configs_that_are_not_of_a_run(untrained, capsys):
    write_model_config(untrained, step=None)
    assert run("--workdir", str(untrained)) == 2
    assert str(untrained / "model/config.json") in capsys.readouterr().err
    for data in ("[]", '"here"', "null", "{}"):
        (untrained / "config.json").write_text(f'{{"data": {data}, "seed": 0}}')
        assert run("--workdir", str(untrained)) == 2
        assert "not the config of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--text-conditions", "original,mising"],
            "'mising'; expected all, .*did you mean missing",
        ),
        (["--text-conditions", "empty"], "empty: expected all, or a list with original"),
        (["--corruptions", "motionblur"], "'motionblur'; .*did you mean motion_blur"),
    ],
)
def test_errors_suggest_the_nearest_name(argv, message):
    with pytest.raises(UserError, match=message):
        arguments.parse(["--workdir", "runs/a", *argv])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "add --source and --output, or"),
        (("--source", "data"), "add --output, or"),
        (("--output", "out"), "add --source, or"),
    ],
)
def test_a_model_folder_needs_source_and_output(options, message):
    with pytest.raises(UserError, match=f"--model weights: .*; {message}"):
        arguments.parse(["--model", "weights", *options])
    args = arguments.parse(["--model", "weights", "--source", "data", "--output", "out"])
    assert args.is_model and args.workdir == "weights"


@pytest.mark.parametrize("text", ["²", "1,²", "", "0", "1,,2", "1.5"])
def test_rejects_invalid_severities(text):
    with pytest.raises(UserError, match="--severities"):
        arguments._severities(text)
    assert arguments._severities("1,3") == (1, 3)


def test_surface_metrics_are_kept_with_the_other_scores(untrained, capsys):
    argv, folder = ("--workdir", str(untrained), "--no-baselines"), untrained / "evaluation/test"
    assert run(*argv, "--text-conditions", "original", "--surface-metrics") == 0
    scores = results_of(folder)["surface_metrics"]
    assert scores["num_images"] == len(stub.RECORDS) and scores["tolerance"] == 2
    assert "each mask's own size" in scores["size"]
    with open(folder / "per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("dsc", "nsd_plate", "nsd_2d"):
        assert np.mean([float(row[name]) for row in rows]) == pytest.approx(scores[name])
    assert f"DSC {100 * scores['dsc']:.2f}, NSD within 2 pixels" in capsys.readouterr().out
    assert run(*argv, "--text-conditions", "original,empty") == 0
    assert results_of(folder)["surface_metrics"] == scores
    assert scores["by_condition"] == {}
    assert run(*argv, "--text-conditions", "original,empty", "--surface-metrics") == 0
    empty = results_of(folder)["surface_metrics"]["by_condition"]["empty"]
    assert empty["num_images"] == len(stub.RECORDS)
    assert empty["dsc"] != scores["dsc"]
    header = (folder / "per_image.csv").read_text().splitlines()[0].split(",")
    assert {"dsc", "nsd_plate", "nsd_2d", "dice_empty"} <= set(header)


def test_all_published_prompt_variants_are_scored(untrained, monkeypatch):
    """The stub follows the prompt: with the wrong side Dice is 0, otherwise unchanged."""
    variants = {name: stub.RIGHT if i % 2 else stub.LEFT for i, name in enumerate(VARIANTS)}
    monkeypatch.setattr(stub, "RECORDS", [{**r, "variants": variants} for r in stub.RECORDS])
    argv = ("--workdir", str(untrained), "--no-baselines")
    argv += ("--text-conditions", ",".join(["original", *VARIANTS]))
    assert run(*argv) == 0
    folder = untrained / "evaluation/test"
    results = results_of(folder)
    assert set(results["conditions"]) >= {"original", *VARIANTS} and results["unavailable"] == []
    rows = list(csv.DictReader((folder / "per_image.csv").open()))
    assert len(rows) == len(stub.RECORDS)
    for name, prompt in variants.items():
        expected = [row["dice_original"] if row["text"] == prompt else "0.0" for row in rows]
        assert [float(row[f"dice_{name}"]) for row in rows] == [float(dice) for dice in expected]
        assert 0 < sum(map(float, expected)) < sum(float(row["dice_original"]) for row in rows)


def test_disagreement_is_printed_on_one_line(capsys):
    section = {"mean_entropy": 0.5, "mean_mutual_information": 0.25, "error_auroc": None}
    evaluate._print_disagreement("samples", section)
    out = capsys.readouterr().out
    assert out.startswith("mean over samples: ")
    assert out.count("\n") == 1 and "0.5000" in out and "0.2500" in out and "AUROC -" in out


def test_writes_all_conditions_baselines_and_files(trained, tmp_path, capsys):
    assert run("--workdir", str(trained), "--split", "test", "--output", str(tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["conditions"]) >= {"original", "empty", "shuffled", "swapped"}
    assert set(results["baselines"]) == {"mean_mask", "mean_mask_per_prompt"}
    for scores in (*results["conditions"].values(), *results["baselines"].values()):
        assert {"dice_global", "iou_global", "dice_mean", "iou_mean", "num_images"} <= set(scores)
        assert set(scores["interval_95"]) == {"dice_global", "iou_global", "dice_mean", "iou_mean"}
    assert results["config"] == json.loads((trained / "config.json").read_text())
    assert results["seed"] == 0
    assert results["subset"] is None
    out = capsys.readouterr().out
    assert "dice_global" in out
    assert "dice_mean" in out
    assert str(tmp_path / "overlays.png") in out
    assert str(tmp_path / "uncertainty.png") in out
    # The synthetic dataset has no published variants; one line reports it.
    assert results["unavailable"] == list(VARIANTS)
    assert f"not in the test split: {', '.join(VARIANTS)}\n" in out
    # The same scores as in the test after training.
    after_training = json.loads((trained / "test/results.json").read_text())
    assert results["conditions"]["original"] == after_training["conditions"]["original"]


@pytest.mark.slow
def test_corruptions_have_a_table_and_a_plot(trained, tmp_path, capsys):
    options = ("--no-baselines", "--text-conditions", "original", "--output", str(tmp_path))
    names = ("--corruptions", "gaussian_noise,jpeg", "--severities", "5")
    assert run("--workdir", str(trained), *options, *names) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["corruptions"]) == {"gaussian_noise", "jpeg", "mean"}
    cells = [results["corruptions"][name]["5"] for name in ("gaussian_noise", "jpeg")]
    assert all(cell["num_images"] == 8 for cell in cells)
    original = results["conditions"]["original"]["dice_mean"]
    assert all(cell["dice_mean"] != original for cell in cells)
    mean = np.mean([cell["dice_mean"] for cell in cells])
    assert results["corruptions"]["mean"]["dice_mean"] == pytest.approx(mean)
    assert "gaussian_noise" in capsys.readouterr().out
    assert Image.open(tmp_path / "corruptions.png").size[0] > 600
    for invalid in (("--corruptions", "fog"), ("--corruptions", "jpeg", "--severities", "0")):
        assert run("--workdir", str(trained), *invalid) == 2


@pytest.mark.slow
def test_calibration_and_tta_of_a_subset(trained, tmp_path, capsys):
    options = ("--subset", "5", "--text-conditions", "original", "--output", str(tmp_path))
    assert run("--workdir", str(trained), *options, "--calibration", "--tta") == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["subset"] == results["num_images"] == 5
    for scores in (results["conditions"]["original"], results["tta"]["original_tta"]):
        assert scores["num_images"] == 5
    assert results["baselines"]["mean_mask"]["num_images"] == 5
    section = results["calibration"]
    assert section["fitted_on"] == "val" and section["temperature"] > 0
    assert section["num_pixels"] == 5 * 56 * 56
    for when in ("before", "after"):
        assert set(section[when]) == {"ece", "brier", "nll", "error_auroc"}
        assert sum(row["count"] for row in section[f"reliability_{when}"]) == 5 * 56 * 56
    assert section["after"]["error_auroc"] == section["before"]["error_auroc"]
    assert Image.open(tmp_path / "reliability.png").size[0] > 600
    assert 0 <= results["tta"]["mean_mutual_information"] <= results["tta"]["mean_entropy"] <= 0.694
    assert "original_tta" in out and "reliability.png" in out
    lines = (tmp_path / "per_image.csv").read_text().splitlines()[1:]
    ids = [line.split(",")[0] for line in lines]
    assert len(ids) == 5 and ids == sorted(ids, key=lambda i: sha256(f"0:{i}".encode()).hexdigest())


@pytest.mark.slow
def test_another_dataset_needs_only_its_test_split(trained, tmp_path, capsys):
    source = tmp_path / "other"
    (source / "images").mkdir(parents=True)
    (source / "masks").mkdir()
    rng = np.random.default_rng(0)
    lines = ["split,image,mask,text"]
    for i in range(3):
        pixels = rng.integers(0, 256, (60, 80)).astype(np.uint8)
        Image.fromarray(pixels).save(source / f"images/{i}.png")
        Image.fromarray((pixels > 128).astype(np.uint8) * 255).save(source / f"masks/{i}.png")
        lines.append(f"test,{i}.png,{i}.png,lower left lung {i}")
    (source / "annotations.csv").write_text("\n".join(lines) + "\n")
    argv = ("--workdir", str(trained), "--source", str(source), "--no-baselines")
    assert run(*argv, "--output", str(tmp_path / "out")) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["data"] == "other"
    assert results["conditions"]["original"]["num_images"] == 3
    assert "baselines" not in results
    # Results on another dataset whose folder has the same name are not overwritten.
    shutil.copytree(trained, tmp_path / "run")
    argv = ("--workdir", str(tmp_path / "run"), "--no-baselines", "--text-conditions", "original")
    assert run(*argv, "--source", str(source)) == 0
    shutil.copytree(source, tmp_path / "second/other")
    (tmp_path / "second/other/annotations.csv").write_text("\n".join(lines[:3]) + "\n")
    assert run(*argv, "--source", str(tmp_path / "second/other")) == 2
    assert "give another --output" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/evaluation/other-test/results.json").read_text())


def test_invalid_arguments_print_one_line(trained, tmp_path, capsys):
    assert run("--workdir", str(tmp_path)) == 2
    assert str(tmp_path) in capsys.readouterr().err
    for names in ("wrong", "empty", "original,fog", ""):
        assert run("--workdir", str(trained), "--text-conditions", names) == 2
        assert "swapped" in capsys.readouterr().err
    for size in ("-1", "0", "9"):
        assert run("--workdir", str(trained), "--no-baselines", "--subset", size) == 2
        assert f"--subset {size}" in capsys.readouterr().err
    for option in ("--batch-size", "--num-samples"):
        assert run("--workdir", str(trained), option, "0") == 2
        assert f"{option} 0: expected at least 1" in capsys.readouterr().err
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/config.json").write_text("{}")
    assert run("--workdir", str(tmp_path / "run")) == 2
    assert "not the config of a run" in capsys.readouterr().err


def test_flip_consistency_is_a_dice(trained, tmp_path, capsys):
    options = ("--no-baselines", "--text-conditions", "original", "--output", str(tmp_path))
    assert run("--workdir", str(trained), *options, "--flip-consistency") == 0
    scores = json.loads((tmp_path / "results.json").read_text())["flip_consistency"]
    assert scores["num_images"] == 8
    assert 0 <= scores["dice_mean"] <= 1
    assert "flip consistency" in capsys.readouterr().out


def test_ensemble_with_evaluates_the_mean_of_several_runs(trained, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained / "model", copy / "model")
    options = ("--no-baselines", "--text-conditions", "original", "--output", str(tmp_path / "out"))
    assert run("--workdir", str(trained), "--ensemble-with", str(copy), *options) == 0
    results = results_of(tmp_path / "out")
    single = results_of(trained / "test")["conditions"]["original"]
    assert results["conditions"]["original"] == single
    assert results["members"] == {"member_0": single, "member_1": single}
    assert results["ensemble_uncertainty"]["mean_mutual_information"] == pytest.approx(0, abs=1e-6)
    (other,) = results["ensemble_with"]
    assert other["folder"] == str(copy) and other["model_sha256"] == results["model_sha256"]
    assert "mean over members: entropy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ensemble-with", "a,b"), "expected --output"),
        (("--ensemble-with", "a,", "--output", "c"), "expected comma-separated work directories"),
        (("--ensemble-with", "a,a", "--output", "c"), "without repetitions"),
        (("--ensemble-with", "run", "--output", "c"), "without --workdir"),
        (
            ("--ensemble-with", "a", "--output", "c", "--uncertainty"),
            "--uncertainty evaluates the samples of one model",
        ),
    ],
)
def test_rejects_invalid_ensembles(options, message):
    with pytest.raises(UserError, match=message):
        arguments.parse(["--workdir", "run", *options])


def test_rejects_an_ensemble_with_different_image_sizes(trained, tmp_path, monkeypatch, capsys):
    load_model = evaluate.inference.load_segmentation_model

    def load(folder):
        model, variables, processor = load_model(trained)
        size = 56 if folder == str(trained) else 112
        return model, variables, dataclasses.replace(processor, image_size=size)

    monkeypatch.setattr(evaluate.inference, "load_segmentation_model", load)
    argv = ("--workdir", str(trained), "--ensemble-with", "b", "--output", str(tmp_path / "out"))
    assert run(*argv) == 2
    assert "b takes images of 112 px" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ensemble_members_are_scored_individually(tmp_path, capsys):
    workdir = tmp_path / "run"
    smoke = ["--config", "default:smoke", "--config.ensemble=2", "--config.num_steps=2"]
    cache = [f"--config.data.cache_dir={tmp_path}", "--config.eval_every=2"]
    with pytest.raises(SystemExit) as stopped:
        train.main([*smoke, *cache, "--workdir", str(workdir)])
    assert not stopped.value.code
    options = ("--no-baselines", "--text-conditions", "original", "--output", str(tmp_path / "out"))
    assert run("--workdir", str(workdir), *options) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results["members"]) == {"member_0", "member_1"}
    assert all(scores["num_images"] == 8 for scores in results["members"].values())
    uncertainty = results["ensemble_uncertainty"]
    assert 0 < uncertainty["mean_mutual_information"] <= uncertainty["mean_entropy"] <= 0.694
    out = capsys.readouterr().out
    assert "member_1" in out and "mean over members: entropy" in out
    after_training = json.loads((workdir / "test/results.json").read_text())
    assert results["conditions"]["original"] == after_training["conditions"]["original"]
