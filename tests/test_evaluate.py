"""The evaluation door."""

import json
import shutil

import pytest

from biclip_jax import evaluate


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
    out = capsys.readouterr().out
    assert "dice_global" in out
    assert "dice_mean" in out
    assert str(tmp_path / "overlays.png") in out
    # The same numbers as the run's own test.
    own = json.loads((trained / "test/results.json").read_text())
    assert results["conditions"]["right"] == own["conditions"]["right"]


def test_mistakes_end_in_a_sentence(trained, tmp_path, capsys):
    assert run("--workdir", str(tmp_path)) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert run("--workdir", str(trained), "--conditions", "wrong") == 2
    assert "mirrored" in capsys.readouterr().err
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/config.json").write_text("{}")
    assert run("--workdir", str(tmp_path / "run")) == 2
    assert "no configuration of a run" in capsys.readouterr().err
