"""The report command."""

import json
import shutil

import pytest

from biclip_jax import report


def run(*argv):
    with pytest.raises(SystemExit) as stopped:
        report.main(list(argv))
    return stopped.value.code


def test_writes_the_report_of_a_finished_run(trained, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run("--workdir", str(trained), "--output", str(page)) == 0
    assert str(page) in capsys.readouterr().out
    results = json.loads((trained / "test/results.json").read_text())
    text = page.read_text(encoding="utf-8")
    assert f"{100 * results['conditions']['original']['dice_mean']:.2f}" in text
    # Only the test after training exists, so nothing is listed as missing.
    assert "Test after training" in text
    assert "biclip evaluate" not in text and "Missing parts" not in text
    assert text.count("data:image/png;base64,") >= 3  # overlays, uncertainty, curves
    assert not list(tmp_path.glob(".*"))


def test_the_default_output_is_in_the_work_directory(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    assert run("--workdir", str(tmp_path / "run")) == 0
    assert (tmp_path / "run/report.html").stat().st_size > 10_000


def test_rejects_a_folder_that_is_not_a_run(tmp_path, capsys):
    assert run("--workdir", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "config.json") in error and "--workdir" in error
