"""Merging new results into those of a previous evaluation."""

import json

import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.evaluation import results_file
from biclip_jax.evaluation.report import tables

CELL = {"dice_global": 0.1, "dice_mean": 0.2, "iou_global": 0.3, "iou_mean": 0.4, "num_images": 2}
FACTS = {
    "split": "test",
    "subset": None,
    "data": "known",
    "best_step": 7,
    "model_sha256": "a",
    "ensemble_with": None,
    "num_images": 2,
    "images_sha256": "b",
    "num_samples": None,
}


def test_reads_only_results_of_the_same_model_and_images(tmp_path):
    path = tmp_path / "results.json"
    assert results_file.read(tmp_path, FACTS) == {}
    path.write_text(json.dumps({**FACTS, "tta": {}}))
    assert results_file.read(tmp_path, FACTS) == {**FACTS, "tta": {}}
    for name in results_file.IDENTITY:
        assert results_file.read(tmp_path, {**FACTS, name: "other"}) == {}
    without = {name: value for name, value in FACTS.items() if name != "model_sha256"}
    for content in (json.dumps(without), "{", "[]", "null", "[" * 100_000):
        path.write_text(content)
        assert results_file.read(tmp_path, FACTS) == {}


def test_results_on_other_images_are_not_overwritten(tmp_path):
    results_file.check_same_images(tmp_path, FACTS)
    for content in ("{", "[]", "{}", json.dumps({**FACTS, "model_sha256": "other"})):
        (tmp_path / "results.json").write_text(content)
        results_file.check_same_images(tmp_path, FACTS)
    (tmp_path / "results.json").write_text(json.dumps({**FACTS, "images_sha256": "other"}))
    with pytest.raises(UserError, match=r"found an evaluation of other images .*--output"):
        results_file.check_same_images(tmp_path, FACTS)


def test_keeps_sections_and_conditions_that_are_not_recomputed():
    before = {
        **FACTS,
        "command": "one",
        "conditions": {"original": CELL, "empty": CELL},
        "unavailable": ["contradictory"],
        "tta": {"views": []},
        "calibration": {"temperature": 2.0},
        "baselines": {"mean_mask": CELL},
        "device": "old",
    }
    other = {**CELL, "dice_mean": 0.9}
    now = {**FACTS, "command": "two", "conditions": {"original": other, "swapped": other}}
    merged = results_file.merge_results(
        before, {**now, "unavailable": ["missing_location"], "tta": {"views": [1]}}
    )
    assert merged["conditions"] == {"original": other, "empty": CELL, "swapped": other}
    assert merged["unavailable"] == ["contradictory", "missing_location"]
    assert merged["tta"] == {"views": [1]}
    assert merged["calibration"] == {"temperature": 2.0}
    assert merged["baselines"] == {"mean_mask": CELL}
    assert merged["command"] == "two" and merged["previous_commands"] == ["one"]
    assert "device" not in merged
    merged_again = results_file.merge_results(merged, {**now, "command": "one", "unavailable": []})
    assert merged_again["previous_commands"] == ["two"]


@pytest.mark.parametrize("corrupted", [3, [1], {"empty": {"dice_mean": 1}, "swapped": "x"}])
def test_drops_damaged_sections(corrupted):
    before = {
        **FACTS,
        "conditions": corrupted,
        "baselines": corrupted,
        "unavailable": 3,
        "command": [1],
    }
    merged = results_file.merge_results(
        before, {"conditions": {"original": CELL}, "unavailable": [], "command": "x"}
    )
    assert merged["conditions"] == {"original": CELL}
    assert not merged.get("baselines")
    assert merged["unavailable"] == merged["previous_commands"] == []


def test_keeps_columns_of_the_same_images(tmp_path):
    path = tmp_path / "per_image.csv"
    rows = [
        {"id": "=a", "text": "t", "dice_original": 0.5},
        {"id": "b", "text": "t", "dice_original": 1},
    ]
    assert results_file.merge_columns(path, rows) == rows
    tables.write_csv(path, [{**r, "dice_missing": 0.25, "mask_area": 3} for r in rows])
    newer = [{**r, "dice_original": 0.75} for r in rows]
    assert results_file.merge_columns(path, newer) == [{**r, "dice_missing": "0.25"} for r in newer]
    assert results_file.merge_columns(path, newer[::-1]) == newer[::-1]
    path.write_bytes(b"\xff\x00")
    assert results_file.merge_columns(path, newer) == newer


def test_the_digest_covers_ids_and_prompts_in_order():
    one, two = ({"id": i, "text": "t", "variants": {}} for i in "ab")
    assert results_file.digest([one, two]) == results_file.digest([one, two])
    others = [[two, one], [one], [one, {**two, "text": "u"}]]
    digests = {results_file.digest(records) for records in [[one, two], *others]}
    assert len(digests) == 4
