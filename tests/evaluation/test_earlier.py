"""What stays of an earlier evaluation."""

import json

import pytest

from biclip_jax.errors import UserError
from biclip_jax.evaluation import earlier, reporting

CELL = {"dice_global": 0.1, "dice_mean": 0.2, "iou_global": 0.3, "iou_mean": 0.4, "num_images": 2}
FACTS = {
    "split": "test",
    "subset": None,
    "data": "known",
    "best_step": 7,
    "model_sha256": "a",
    "together": None,
    "num_images": 2,
    "pictures_sha256": "b",
    "num_samples": None,
}


def test_only_the_same_model_on_the_same_pictures_is_the_same_evaluation(tmp_path):
    path = tmp_path / "results.json"
    assert earlier.read(tmp_path, FACTS) == {}
    path.write_text(json.dumps({**FACTS, "tta": {}}))
    assert earlier.read(tmp_path, FACTS) == {**FACTS, "tta": {}}
    for name in earlier.IDENTITY:
        assert earlier.read(tmp_path, {**FACTS, name: "other"}) == {}
    without = {name: value for name, value in FACTS.items() if name != "model_sha256"}
    for content in (json.dumps(without), "{", "[]", "null", "[" * 100_000):
        path.write_text(content)
        assert earlier.read(tmp_path, FACTS) == {}


def test_pictures_of_another_data_set_are_not_lost(tmp_path):
    earlier.check_pictures(tmp_path, FACTS)
    for left in ("{", "[]", "{}", json.dumps({**FACTS, "model_sha256": "other"})):
        (tmp_path / "results.json").write_text(left)
        earlier.check_pictures(tmp_path, FACTS)
    (tmp_path / "results.json").write_text(json.dumps({**FACTS, "pictures_sha256": "other"}))
    with pytest.raises(UserError, match=r"holds an evaluation of other pictures .*--output"):
        earlier.check_pictures(tmp_path, FACTS)


def test_sections_and_conditions_that_are_not_made_now_stay():
    before = {
        **FACTS,
        "command": "one",
        "conditions": {"right": CELL, "missing": CELL},
        "left_out": ["contradictory"],
        "tta": {"views": []},
        "calibration": {"temperature": 2.0},
        "baselines": {"mean_mask": CELL},
        "device": "old",
    }
    other = {**CELL, "dice_mean": 0.9}
    now = {**FACTS, "command": "two", "conditions": {"right": other, "mirrored": other}}
    found = earlier.merged(before, {**now, "left_out": ["missing_location"], "tta": {"views": [1]}})
    assert found["conditions"] == {"right": other, "missing": CELL, "mirrored": other}
    assert found["left_out"] == ["contradictory", "missing_location"]
    assert found["tta"] == {"views": [1]}
    assert found["calibration"] == {"temperature": 2.0}
    assert found["baselines"] == {"mean_mask": CELL}
    assert found["command"] == "two" and found["earlier_commands"] == ["one"]
    assert "device" not in found
    again = earlier.merged(found, {**now, "command": "one", "left_out": []})
    assert again["earlier_commands"] == ["two"]


@pytest.mark.parametrize("damaged", [3, [1], {"missing": {"dice_mean": 1}, "mirrored": "x"}])
def test_damaged_sections_do_not_stay(damaged):
    before = {**FACTS, "conditions": damaged, "baselines": damaged, "left_out": 3, "command": [1]}
    found = earlier.merged(before, {"conditions": {"right": CELL}, "left_out": [], "command": "x"})
    assert found["conditions"] == {"right": CELL}
    assert not found.get("baselines")
    assert found["left_out"] == found["earlier_commands"] == []


def test_columns_of_the_same_pictures_stay(tmp_path):
    path = tmp_path / "per_image.csv"
    rows = [{"id": "=a", "text": "t", "dice_right": 0.5}, {"id": "b", "text": "t", "dice_right": 1}]
    assert earlier.with_columns(path, rows) == rows
    reporting.write_csv(path, [{**r, "dice_missing": 0.25, "mask_area": 3} for r in rows])
    newer = [{**r, "dice_right": 0.75} for r in rows]
    assert earlier.with_columns(path, newer) == [{**r, "dice_missing": "0.25"} for r in newer]
    assert earlier.with_columns(path, newer[::-1]) == newer[::-1]
    path.write_bytes(b"\xff\x00")
    assert earlier.with_columns(path, newer) == newer


def test_the_digest_is_of_ids_and_sentences_in_order():
    one, two = ({"id": i, "text": "t", "variants": {}} for i in "ab")
    assert earlier.digest([one, two]) == earlier.digest([one, two])
    others = [[two, one], [one], [one, {**two, "text": "u"}]]
    assert len({earlier.digest(spoken) for spoken in others} | {earlier.digest([one, two])}) == 4
