"""The generalization command: in-domain and out-of-domain scores and their harmonic mean."""

import json

import numpy as np
import pytest

from biclip_jax import generalization
from biclip_jax.core.errors import UserError


def write_results(folder, data, dice, surface=None, source=""):
    results = {
        "data": data,
        "config": {"data": {"name": data, "source": source}},
        "conditions": {"original": {"dice_global": dice, "dice_mean": dice / 2, "num_images": 5}},
    }
    if surface:
        results["surface_metrics"] = {"dsc": surface, "nsd_plate": 0.1, "nsd_2d": 0.2}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture
def workdirs(tmp_path):
    write_results(tmp_path / "a" / "evaluation" / "test", "folder", 0.9, 0.7, source="/data/BUSI")
    write_results(tmp_path / "a" / "evaluation" / "BUSUC-test", "BUSUC", 0.6, 0.3)
    write_results(tmp_path / "b" / "evaluation" / "test", "kvasir_seg", 0.8, 0.5)
    write_results(tmp_path / "b" / "evaluation" / "BKAI-test", "BKAI", 0.4, 0.4)
    write_results(tmp_path / "b" / "evaluation" / "CVC300-test", "CVC300", 0.2, 0.2)
    write_results(tmp_path / "b" / "evaluation" / "CVC300-test-50", "CVC300", 0.99)  # a subset
    write_results(tmp_path / "b" / "evaluation" / "val", "kvasir_seg", 0.99)
    return [tmp_path / "a", tmp_path / "b"]


def test_means_over_datasets_and_their_harmonic_mean(workdirs):
    result = generalization.compare(workdirs)
    datasets = [(row["trained_on"], row["tested_on"], row["domain"]) for row in result["rows"]]
    assert datasets == [
        ("BUSI", "BUSI", "ID"),
        ("BUSI", "BUSUC", "OOD"),
        ("kvasir_seg", "kvasir_seg", "ID"),
        ("kvasir_seg", "BKAI", "OOD"),
        ("kvasir_seg", "CVC300", "OOD"),
    ]
    mean = result["mean"]
    np.testing.assert_allclose(mean["ID"]["dice_global"], 0.85)
    np.testing.assert_allclose(mean["OOD"]["dice_global"], 0.4)
    np.testing.assert_allclose(mean["HM"]["dice_global"], 2 * 0.85 * 0.4 / 1.25)
    np.testing.assert_allclose(mean["HM"]["dsc"], 2 * 0.6 * 0.3 / 0.9)


def test_reproduces_the_published_harmonic_mean():
    # arXiv 2602.20423, table on domain generalization: 89.11 ID, 79.02 OOD, 83.76.
    rows = [{"domain": "ID", "dsc": 0.8911}, {"domain": "OOD", "dsc": 0.7902}]
    assert round(100 * generalization.means(rows, ["dsc"])["HM"]["dsc"], 2) == 83.76


def test_omits_metrics_that_a_row_lacks(workdirs):
    write_results(workdirs[0] / "evaluation" / "UDIAT-test", "UDIAT", 0.5)
    result = generalization.compare(workdirs)
    assert set(result["mean"]["HM"]) == {"dice_global", "dice_mean"}
    assert all("dsc" not in row for row in result["rows"])


def test_the_command_prints_and_writes_the_result(workdirs, tmp_path, capsys):
    output = tmp_path / "out" / "generalization.json"
    with pytest.raises(SystemExit) as stopped:
        generalization.main([*map(str, workdirs), "--output", str(output)])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "harmonic mean" in printed and "54.40" in printed
    assert json.loads(output.read_text()) == generalization.compare(workdirs)


def test_rejects_a_run_without_in_domain_results(workdirs):
    (workdirs[0] / "evaluation" / "test" / "results.json").unlink()
    with pytest.raises(UserError, match=r"evaluate --workdir .*a --split test"):
        generalization.compare(workdirs)


def test_rejects_runs_without_another_dataset(tmp_path):
    write_results(tmp_path / "a" / "evaluation" / "test", "kvasir_seg", 0.9)
    with pytest.raises(UserError, match="--source DIR"):
        generalization.compare([tmp_path / "a"])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[]",
        '{"data": "x"}',
        '{"data": "x", "conditions": null}',
        '{"data": "x", "conditions": {"original": {"dice_mean": 0.5}}}',
        '{"data": "x", "conditions": {"original": {"num_images": 3, "dice_mean": null}}}',
    ],
)
def test_errors_name_the_damaged_file(workdirs, text):
    path = workdirs[1] / "evaluation" / "BKAI-test" / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match="BKAI-test"):
        generalization.compare(workdirs)


def test_rejects_scores_without_a_common_metric(workdirs):
    path = workdirs[1] / "evaluation" / "BKAI-test" / "results.json"
    path.write_text('{"data": "x", "conditions": {"original": {"num_images": 3}}}')
    with pytest.raises(UserError, match=r"on x\b.*no common metric"):
        generalization.compare(workdirs)
