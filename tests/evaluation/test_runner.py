"""Evaluation of a split, with a predictor whose answers are known."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from biclip_jax.data import label_subset
from biclip_jax.data.image_io import resize_probability
from biclip_jax.evaluation import baselines, runner
from biclip_jax.evaluation.metrics import calibration, overlap
from biclip_jax.evaluation.robustness import corruptions, tta

SIZE, FULL = 8, 16
LEFT, RIGHT = "one area, lower left lung.", "one area, lower right lung."


def record(i):
    """Odd ids have their lesion on the right; every third picture is of another size."""
    side = FULL // 2 if i % 2 else 0
    full = np.zeros((FULL, FULL + 4 * (i % 3 == 0), 1), np.uint8)
    full[4 : 8 + i % 4, side : side + 6] = 1
    mask = np.zeros((SIZE, SIZE, 1), np.uint8)
    mask[2:4, side // 2 : side // 2 + 3] = 1
    image = np.full((SIZE, SIZE, 1), 20 * i, np.uint8)
    text = RIGHT if i % 2 else LEFT
    return {"id": f"p{i}", "image": image, "mask": mask, "full_mask": full, "text": text}


RECORDS = [record(i) for i in range(11)]
TEXTS = [record["text"] for record in RECORDS]


def encode(prompts):
    """One token a sentence: 0 empty, 1 left, 2 right."""
    ids = [[0 if not s else 1 + ("right" in s)] for s in prompts]
    return {"text_ids": np.array(ids, np.int32), "text_mask": np.ones((len(ids), 1), bool)}


def predict(batch):
    """Says the side that the sentence names; half of the height; nothing without a sentence."""
    probs = np.zeros((*batch["image"].shape[:3], 1), np.float32)
    for row, token in enumerate(batch["text_ids"][:, 0]):
        if token:
            start = SIZE // 2 if token == 2 else 0
            probs[row, 2:4, start : start + 3] = 0.9
    return probs


@pytest.fixture(scope="module")
def found():
    return runner.evaluate_conditions(predict, encode, RECORDS, batch_size=4)


def test_every_record_is_counted_once_at_its_own_size(found):
    areas = [r["full_mask"].sum() for r in RECORDS]
    for counts in found.values():
        assert counts.mask_area.tolist() == areas


def test_conditions_give_the_model_other_sentences(found):
    scores = {name: overlap.summarize(counts)["dice_global"] for name, counts in found.items()}
    assert scores["original"] > 0.7
    assert scores["empty"] == 0
    # Two sentences: another image's is always the other side, and so is the mirrored one.
    assert scores["shuffled"] == scores["swapped"] == 0


def test_a_split_with_one_sentence_has_no_shuffled_condition():
    same = [{**r, "text": LEFT} for r in RECORDS]
    assert "shuffled" not in runner.evaluate_conditions(predict, encode, same, batch_size=4)


def test_published_variants_are_counted_on_the_pictures_that_have_them():
    # The first eight are told that the lesion is on the other side.
    varied = [
        {**r, "variants": {"contradictory": LEFT if r["text"] == RIGHT else RIGHT} if i < 8 else {}}
        for i, r in enumerate(RECORDS)
    ]
    found = runner.evaluate_conditions(predict, encode, varied, batch_size=4)
    scores = runner.results(found, varied)["conditions"]
    assert "missing_location" not in scores
    assert scores["contradictory"]["num_images"] == 8
    assert scores["contradictory"]["dice_global"] == 0
    same = overlap.summarize(overlap.take(found["original"], np.arange(8)))
    assert scores["original_where_contradictory"]["dice_mean"] == same["dice_mean"]
    rows = runner.per_image_rows(found, varied)
    assert [row["dice_contradictory"] for row in rows] == [0.0] * 8 + [None] * 3
    assert rows[9]["dice_original"] == overlap.dice(found["original"])[9]


def test_pixel_histogram_is_of_all_pixels_at_their_own_size():
    def uncertainty(batch):
        return 0.05 + 0.9 * predict(batch)

    found = runner.pixel_histogram(uncertainty, encode, RECORDS, batch_size=4)
    texts = encode(TEXTS)
    expected = np.zeros_like(found)
    for i, r in enumerate(RECORDS):
        maps = uncertainty({"image": r["image"][None], "text_ids": texts["text_ids"][i : i + 1]})
        full = r["full_mask"][..., 0]
        expected += calibration.histogram(resize_probability(maps[0, ..., 0], *full.shape), full)
    np.testing.assert_array_equal(found, expected)
    assert found.sum() == sum(r["full_mask"].size for r in RECORDS)


def test_views_of_an_equivariant_predictor_change_nothing():
    views = {name: tta.VIEWS[name] for name in ("identity", "horizontal_flip", "contrast_0.9")}

    # The mirrored sentence names the other side, and the flipped prediction is there.
    def follows(batch):
        probs = predict({**batch, "text_ids": np.ones_like(batch["text_ids"])})
        right = batch["text_ids"][:, 0] == 2
        probs[right] = probs[right][:, :, ::-1]
        return probs

    found = runner.evaluate_tta(follows, encode, RECORDS, batch_size=4, views=views)
    counts = runner.overlap_at_mask_size(follows, RECORDS, encode(TEXTS), 4)
    right = overlap.summarize(counts)
    assert {name: found["original_tta"][name] for name in right} == right
    assert found["views"] == list(views)
    assert found["mean_mutual_information"] == pytest.approx(0, abs=1e-7)
    own = runner.pixel_histogram(follows, encode, RECORDS, 4)
    assert found["error_auroc"] == calibration.error_auroc(own)
    # 0.9 in one sixteenth and a half of the picture, certain elsewhere.
    assert 0 < found["mean_entropy"] < 0.1


def test_members_are_scored_and_their_disagreement_is_measured_in_one_pass():
    calls = []

    def half(batch):
        calls.append(1)
        return 0.5 * predict(batch)  # 0.45: below the threshold

    found = runner.evaluate_members([predict, half], encode, RECORDS, batch_size=4)
    assert len(calls) == 3
    alone = runner.evaluate_members([predict], encode, RECORDS, batch_size=4)
    assert list(found["members"]) == ["member_0", "member_1"]
    assert found["members"]["member_0"] == alone["members"]["member_0"]
    counts = runner.overlap_at_mask_size(predict, RECORDS, encode(TEXTS), 4)
    right = overlap.summarize(counts)
    assert {k: found["members"]["member_0"][k] for k in right} == right
    assert found["members"]["member_1"]["dice_global"] == 0
    uncertainty = found["ensemble_uncertainty"]
    assert 0 < uncertainty["mean_mutual_information"] < uncertainty["mean_entropy"]
    assert alone["ensemble_uncertainty"]["mean_mutual_information"] == pytest.approx(0, abs=1e-7)

    def mean(batch):
        return 0.75 * predict(batch)

    own = runner.pixel_histogram(mean, encode, RECORDS, 4)
    assert uncertainty["error_auroc"] == calibration.error_auroc(own)


def test_degradations_of_an_earlier_evaluation_stay_beside_those_of_this_one():
    def section(names, severities, before=None):
        found = runner.evaluate_corruptions(
            lambda corruption: predict,
            encode,
            RECORDS,
            names=names,
            severities=severities,
            batch_size=4,
        )
        return runner.corruption_results(found, before)

    before = section(("gamma",), (2, 4))
    before["gamma"]["4"] |= dict.fromkeys(before["mean"], 0.0)
    broken = {**before, "jpeg": {"2": {}, "x": before["gamma"]["2"]}, "bad": 3}
    both = section(("motion_blur", "gamma"), (1, 2), broken)
    assert {name: list(both[name]) for name in ("gamma", "motion_blur")} == {
        "gamma": ["1", "2", "4"],
        "motion_blur": ["1", "2"],
    }
    assert set(both) == {"gamma", "motion_blur", "mean"}
    mean = np.mean([both[n][s]["dice_mean"] for n in ("gamma", "motion_blur") for s in both[n]])
    assert both["mean"]["dice_mean"] == pytest.approx(mean)
    assert both["gamma"]["4"] == before["gamma"]["4"]


def test_results_report_mirrored_images_that_change_apart():
    symmetric = {**RECORDS[0], "id": "s", "text": "all left lung and all right lung"}
    records = [*RECORDS, symmetric]
    counts = runner.evaluate_conditions(predict, encode, records, batch_size=4)
    scores = runner.results(counts, records)["conditions"]
    assert scores["swapped"]["num_images"] == 12
    assert scores["swapped_changed"]["num_images"] == 11
    assert scores["original_where_swap_changes"]["num_images"] == 11
    low, high = scores["original"]["interval_95"]["dice_mean"]
    assert low <= scores["original"]["dice_mean"] <= high


def test_pictures_whose_sentence_was_not_trained_on_are_scored_apart():
    counts = runner.evaluate_conditions(
        predict, encode, RECORDS, batch_size=4, conditions=["original"]
    )
    trained = {LEFT}
    new = np.array([record["text"] not in trained for record in RECORDS])
    assert 0 < new.sum() < len(new)
    found = runner.results(counts, RECORDS, trained)["conditions"]["original_where_prompt_is_new"]
    assert found["num_images"] == new.sum()
    own = overlap.summarize(overlap.take(counts["original"], new))
    assert found["dice_global"] == own["dice_global"]
    every = {record["text"] for record in RECORDS}
    for known in (None, every):
        assert list(runner.results(counts, RECORDS, known)["conditions"]) == ["original"]


def test_evaluate_writes_numbers_lines_and_pictures_that_agree(tmp_path):
    outcome = runner.evaluate(
        predict,
        encode,
        RECORDS,
        folder=tmp_path / "out",
        conditions=("original", "empty"),
        batch_size=4,
        extra={"split": "test"},
    )
    assert json.loads((tmp_path / "out/results.json").read_text()) == outcome
    assert outcome["split"] == "test"
    assert outcome["unavailable"] == []
    assert set(outcome["conditions"]) == {"original", "empty"}
    with open(tmp_path / "out/per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [r["id"] for r in RECORDS]
    mean = np.mean([float(row["dice_original"]) for row in rows])
    assert mean == pytest.approx(outcome["conditions"]["original"]["dice_mean"])
    assert Image.open(tmp_path / "out/overlays.png").size[0] > 300
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "overlays.png",
        "per_image.csv",
        "results.json",
        "uncertainty.png",
    ]


def test_page_rows_are_the_best_the_middle_and_the_worst(found):
    rows = runner.figure_rows(predict, encode, RECORDS, found["original"], batch_size=4)
    scores = np.sort(np.asarray(overlap.dice(found["original"])))
    bands = {b: [r["dice"] for r in rows if r["band"] == b] for b in ("best", "median", "worst")}
    assert bands["best"] == pytest.approx(scores[::-1][:3].tolist())
    assert bands["worst"] == pytest.approx(scores[:3].tolist())
    assert scores[5] in bands["median"]
    for row in rows:
        source = next(r for r in RECORDS if r["id"] == row["id"])
        assert row["pred"].shape == source["full_mask"].shape[:2]
        assert row["image"].shape == (*source["full_mask"].shape[:2], 1)


def test_validate_adds_up_over_batches_and_refuses_to_lose_a_record():
    def eval_fn(batch):
        return overlap.overlap_sums(predict(batch), batch["mask"], batch["valid"])

    texts = encode([r["text"] for r in RECORDS])
    scores = runner.validate(eval_fn, RECORDS, texts, batch_size=4)
    masks = np.stack([r["mask"] for r in RECORDS])
    probs = predict({"image": np.zeros((11, SIZE, SIZE, 1)), "text_ids": texts["text_ids"]})
    assert scores == pytest.approx(overlap.summarize(overlap.count_pixels(probs >= 0.5, masks)))

    def losing(batch):
        return overlap.overlap_sums(predict(batch), batch["mask"], batch["valid"] & False | True)

    with pytest.raises(AssertionError, match="12 of 11"):
        runner.validate(losing, RECORDS, texts, batch_size=4)


def test_mean_masks_are_means_over_all_and_over_each_sentence():
    prior, table = baselines.mean_masks(RECORDS)
    masks = np.stack([r["mask"][..., 0] for r in RECORDS]).astype(float)
    np.testing.assert_allclose(prior, masks.mean(0))
    np.testing.assert_allclose(table[RIGHT], masks[1::2].mean(0))


def test_image_free_baselines_use_the_sentence_or_nothing():
    unseen = {**RECORDS[0], "text": "a new sentence"}
    found = baselines.image_free(RECORDS[:8], RECORDS[8:], [*RECORDS, unseen])
    blind = overlap.summarize(found["mean_mask"])
    told = overlap.summarize(found["mean_mask_per_prompt"])
    assert told["dice_global"] > blind["dice_global"] + 0.1
    assert found["mean_mask"].intersection[-1] == found["mean_mask_per_prompt"].intersection[-1]


def test_degradations_reach_the_predictor_by_id_and_jpeg_reaches_the_pictures():
    seen = {}

    def make(corruption):
        def predict_noting(batch):
            name = "jpeg" if corruption is None else "device"
            seen.setdefault(name, []).append(batch)
            return predict(batch)

        return predict_noting

    arguments = {"names": ("gamma", "jpeg"), "severities": (2, 5), "batch_size": 4}
    found = runner.evaluate_corruptions(make, encode, RECORDS, **arguments)
    assert {name: list(rows) for name, rows in found.items()} == {"gamma": [2, 5], "jpeg": [2, 5]}
    hashes = np.concatenate([batch["image_hash"] for batch in seen["device"][:3]])[: len(RECORDS)]
    np.testing.assert_array_equal(hashes, label_subset.hash_ids([r["id"] for r in RECORDS]))
    images = np.concatenate([batch["image"] for batch in seen["jpeg"][3:]])[: len(RECORDS)]
    expected = np.stack([corruptions.jpeg(record["image"], 5) for record in RECORDS])
    np.testing.assert_array_equal(images, expected)

    scores = runner.corruption_results(found)
    right = overlap.summarize(runner.overlap_at_mask_size(predict, RECORDS, encode(TEXTS), 4))
    for name in ("gamma", "jpeg"):
        for severity in ("2", "5"):
            assert scores[name][severity]["dice_global"] == right["dice_global"]
    assert scores["mean"]["dice_mean"] == pytest.approx(right["dice_mean"])
