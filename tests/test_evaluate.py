"""The evaluation door."""

import json
import shutil
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from biclip_jax import evaluate, train
from biclip_jax.data.annotations import VARIANTS


def run(*argv):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(list(argv))
    return stopped.value.code


def test_every_condition_baseline_and_file(trained, tmp_path, capsys):
    assert run("--workdir", str(trained), "--split", "test", "--output", str(tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["conditions"]) >= {"right", "missing", "shuffled", "mirrored"}
    assert set(results["baselines"]) == {"mean_mask", "mean_mask_per_sentence"}
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
    # The synthetic set has no published variants, and the evaluation says so in one line.
    assert results["left_out"] == list(VARIANTS)
    assert f"has none: {', '.join(VARIANTS)}\n" in out
    # The same numbers as the run's own test.
    own = json.loads((trained / "test/results.json").read_text())
    assert results["conditions"]["right"] == own["conditions"]["right"]


def test_damaged_pictures_have_their_table_and_plot(trained, tmp_path, capsys):
    options = ("--no-baselines", "--text-conditions", "right", "--output", str(tmp_path))
    names = ("--degradations", "gaussian_noise,jpeg", "--severities", "5")
    assert run("--workdir", str(trained), *options, *names) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["degradations"]) == {"gaussian_noise", "jpeg", "mean"}
    cells = [results["degradations"][name]["5"] for name in ("gaussian_noise", "jpeg")]
    assert all(cell["num_images"] == 8 for cell in cells)
    right = results["conditions"]["right"]["dice_mean"]
    assert all(cell["dice_mean"] != right for cell in cells)
    mean = np.mean([cell["dice_mean"] for cell in cells])
    assert results["degradations"]["mean"]["dice_mean"] == pytest.approx(mean)
    assert "gaussian_noise" in capsys.readouterr().out
    assert Image.open(tmp_path / "degradations.png").size[0] > 600
    for wrong in (("--degradations", "fog"), ("--degradations", "jpeg", "--severities", "0")):
        assert run("--workdir", str(trained), *wrong) == 2


def test_calibration_and_views_of_a_subset(trained, tmp_path, capsys):
    options = ("--subset", "5", "--text-conditions", "right", "--output", str(tmp_path))
    assert run("--workdir", str(trained), *options, "--calibration", "--tta") == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["subset"] == results["num_images"] == 5
    for scores in (results["conditions"]["right"], results["tta"]["right_tta"]):
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
    assert "right_tta" in out and "reliability.png" in out
    lines = (tmp_path / "per_image.csv").read_text().splitlines()[1:]
    ids = [line.split(",")[0] for line in lines]
    assert len(ids) == 5 and ids == sorted(ids, key=lambda i: sha256(f"0:{i}".encode()).hexdigest())


def test_another_data_set_needs_its_test_split_alone(trained, tmp_path, capsys):
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
    assert results["conditions"]["right"]["num_images"] == 3
    assert "baselines" not in results


def test_mistakes_end_in_a_sentence(trained, tmp_path, capsys):
    assert run("--workdir", str(tmp_path)) == 2
    assert str(tmp_path) in capsys.readouterr().err
    for names in ("wrong", "missing", "right,fog", ""):
        assert run("--workdir", str(trained), "--text-conditions", names) == 2
        assert "mirrored" in capsys.readouterr().err
    for size in ("-1", "9"):
        assert run("--workdir", str(trained), "--no-baselines", "--subset", size) == 2
        assert f"--subset {size}" in capsys.readouterr().err
    assert run("--workdir", str(trained), "--batch-size", "0") == 2
    assert "at least 1" in capsys.readouterr().err
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/config.json").write_text("{}")
    assert run("--workdir", str(tmp_path / "run")) == 2
    assert "no configuration of a run" in capsys.readouterr().err


def test_mirroring_is_a_dice_of_the_model_with_itself(trained, tmp_path, capsys):
    options = ("--no-baselines", "--text-conditions", "right", "--output", str(tmp_path))
    assert run("--workdir", str(trained), *options, "--mirroring") == 0
    found = json.loads((tmp_path / "results.json").read_text())["mirroring"]
    assert found["num_images"] == 8
    assert 0 <= found["dice_mean"] <= 1
    assert "mirrored against itself" in capsys.readouterr().out


def test_members_of_an_ensemble_are_scored_singly(tmp_path, capsys):
    workdir = tmp_path / "run"
    smoke = ["--config", "default:smoke", "--config.ensemble=2", "--config.num_steps=2"]
    cache = [f"--config.data.cache_dir={tmp_path}", "--config.eval_every=2"]
    with pytest.raises(SystemExit) as stopped:
        train.main([*smoke, *cache, "--workdir", str(workdir)])
    assert not stopped.value.code
    options = ("--no-baselines", "--text-conditions", "right", "--output", str(tmp_path / "out"))
    assert run("--workdir", str(workdir), *options) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results["members"]) == {"member_0", "member_1"}
    assert all(scores["num_images"] == 8 for scores in results["members"].values())
    assert "member_1" in capsys.readouterr().out
    own = json.loads((workdir / "test/results.json").read_text())
    assert results["conditions"]["right"] == own["conditions"]["right"]
