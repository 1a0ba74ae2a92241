"""Evaluation of a split with a stub predictor."""

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
    """Odd ids have the lesion on the right; every third image has another size."""
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
    """Encodes a prompt as one token: 0 empty, 1 left, 2 right."""
    ids = [[0 if not s else 1 + ("right" in s)] for s in prompts]
    return {"text_ids": np.array(ids, np.int32), "text_mask": np.ones((len(ids), 1), bool)}


def predict(batch):
    """Predicts a box on the side named in the prompt, nothing without a prompt."""
    probs = np.zeros((*batch["image"].shape[:3], 1), np.float32)
    for row, token in enumerate(batch["text_ids"][:, 0]):
        if token:
            start = SIZE // 2 if token == 2 else 0
            probs[row, 2:4, start : start + 3] = 0.9
    return probs


@pytest.fixture(scope="module")
def counts_by_condition():
    return runner.evaluate_conditions(predict, encode, RECORDS, batch_size=4)


def test_every_record_is_counted_once_at_its_mask_size(counts_by_condition):
    areas = [r["full_mask"].sum() for r in RECORDS]
    for counts in counts_by_condition.values():
        assert counts.mask_area.tolist() == areas


def test_conditions_change_the_prompts(counts_by_condition):
    scores = {
        name: overlap.summarize(counts)["dice_global"]
        for name, counts in counts_by_condition.items()
    }
    assert scores["original"] > 0.7
    assert scores["empty"] == 0
    # There are two prompts, so a shuffled or swapped prompt always names the other side.
    assert scores["shuffled"] == scores["swapped"] == 0


def test_a_split_with_one_prompt_has_no_shuffled_condition():
    same = [{**r, "text": LEFT} for r in RECORDS]
    assert "shuffled" not in runner.evaluate_conditions(predict, encode, same, batch_size=4)


def test_published_variants_are_scored_on_the_images_that_have_them():
    # The prompts of the first eight images name the other side.
    varied = [
        {**r, "variants": {"contradictory": LEFT if r["text"] == RIGHT else RIGHT} if i < 8 else {}}
        for i, r in enumerate(RECORDS)
    ]
    counts = runner.evaluate_conditions(predict, encode, varied, batch_size=4)
    scores = runner.results(counts, varied)["conditions"]
    assert "missing_location" not in scores
    assert scores["contradictory"]["num_images"] == 8
    assert scores["contradictory"]["dice_global"] == 0
    same = overlap.summarize(overlap.take(counts["original"], np.arange(8)))
    assert scores["original_where_contradictory"]["dice_mean"] == same["dice_mean"]
    rows = runner.per_image_rows(counts, varied)
    assert [row["dice_contradictory"] for row in rows] == [0.0] * 8 + [None] * 3
    assert rows[9]["dice_original"] == overlap.dice(counts["original"])[9]


def test_pixel_histogram_counts_all_pixels_at_mask_size():
    def uncertainty(batch):
        return 0.05 + 0.9 * predict(batch)

    histogram = runner.pixel_histogram(uncertainty, encode, RECORDS, batch_size=4)
    texts = encode(TEXTS)
    expected = np.zeros_like(histogram)
    for i, r in enumerate(RECORDS):
        maps = uncertainty({"image": r["image"][None], "text_ids": texts["text_ids"][i : i + 1]})
        full = r["full_mask"][..., 0]
        expected += calibration.histogram(resize_probability(maps[0, ..., 0], *full.shape), full)
    np.testing.assert_array_equal(histogram, expected)
    assert histogram.sum() == sum(r["full_mask"].size for r in RECORDS)


def test_views_of_an_equivariant_predictor_change_nothing():
    views = {name: tta.VIEWS[name] for name in ("identity", "horizontal_flip", "contrast_0.9")}

    # Equivariant: the swapped prompt gives the flipped prediction.
    def equivariant(batch):
        probs = predict({**batch, "text_ids": np.ones_like(batch["text_ids"])})
        right = batch["text_ids"][:, 0] == 2
        probs[right] = probs[right][:, :, ::-1]
        return probs

    result = runner.evaluate_tta(equivariant, encode, RECORDS, batch_size=4, views=views)
    counts = runner.overlap_at_mask_size(equivariant, RECORDS, encode(TEXTS), 4)
    expected = overlap.summarize(counts)
    assert {name: result["original_tta"][name] for name in expected} == expected
    assert result["views"] == list(views)
    assert result["mean_mutual_information"] == pytest.approx(0, abs=1e-7)
    histogram = runner.pixel_histogram(equivariant, encode, RECORDS, 4)
    assert result["error_auroc"] == calibration.error_auroc(histogram)
    # The probability is 0.9 in a small box and 0 elsewhere.
    assert 0 < result["mean_entropy"] < 0.1


def test_members_are_scored_and_their_disagreement_is_measured_in_one_pass():
    calls = []

    def predict_half(batch):
        calls.append(1)
        return 0.5 * predict(batch)  # 0.45: below the threshold

    result = runner.evaluate_members([predict, predict_half], encode, RECORDS, batch_size=4)
    assert len(calls) == 3
    single = runner.evaluate_members([predict], encode, RECORDS, batch_size=4)
    assert list(result["members"]) == ["member_0", "member_1"]
    assert result["members"]["member_0"] == single["members"]["member_0"]
    counts = runner.overlap_at_mask_size(predict, RECORDS, encode(TEXTS), 4)
    expected = overlap.summarize(counts)
    assert {k: result["members"]["member_0"][k] for k in expected} == expected
    assert result["members"]["member_1"]["dice_global"] == 0
    uncertainty = result["ensemble_uncertainty"]
    assert 0 < uncertainty["mean_mutual_information"] < uncertainty["mean_entropy"]
    assert single["ensemble_uncertainty"]["mean_mutual_information"] == pytest.approx(0, abs=1e-7)

    def mean(batch):
        return 0.75 * predict(batch)

    histogram = runner.pixel_histogram(mean, encode, RECORDS, 4)
    assert uncertainty["error_auroc"] == calibration.error_auroc(histogram)


def test_corruptions_of_a_previous_evaluation_are_kept():
    def section(names, severities, before=None):
        counts = runner.evaluate_corruptions(
            lambda corruption: predict,
            encode,
            RECORDS,
            names=names,
            severities=severities,
            batch_size=4,
        )
        return runner.corruption_results(counts, before)

    before = section(("gamma",), (2, 4))
    before["gamma"]["4"] |= dict.fromkeys(before["mean"], 0.0)
    damaged = {**before, "jpeg": {"2": {}, "x": before["gamma"]["2"]}, "bad": 3}
    merged = section(("motion_blur", "gamma"), (1, 2), damaged)
    assert {name: list(merged[name]) for name in ("gamma", "motion_blur")} == {
        "gamma": ["1", "2", "4"],
        "motion_blur": ["1", "2"],
    }
    assert set(merged) == {"gamma", "motion_blur", "mean"}
    mean = np.mean([merged[n][s]["dice_mean"] for n in ("gamma", "motion_blur") for s in merged[n]])
    assert merged["mean"]["dice_mean"] == pytest.approx(mean)
    assert merged["gamma"]["4"] == before["gamma"]["4"]


def test_images_whose_swapped_prompt_differs_are_scored_separately():
    symmetric = {**RECORDS[0], "id": "s", "text": "all left lung and all right lung"}
    records = [*RECORDS, symmetric]
    counts = runner.evaluate_conditions(predict, encode, records, batch_size=4)
    scores = runner.results(counts, records)["conditions"]
    assert scores["swapped"]["num_images"] == 12
    assert scores["swapped_changed"]["num_images"] == 11
    assert scores["original_where_swap_changes"]["num_images"] == 11
    low, high = scores["original"]["interval_95"]["dice_mean"]
    assert low <= scores["original"]["dice_mean"] <= high


def test_images_with_new_prompts_are_scored_separately():
    counts = runner.evaluate_conditions(
        predict, encode, RECORDS, batch_size=4, conditions=["original"]
    )
    trained = {LEFT}
    new = np.array([record["text"] not in trained for record in RECORDS])
    assert 0 < new.sum() < len(new)
    scores = runner.results(counts, RECORDS, trained)["conditions"]["original_where_prompt_is_new"]
    assert scores["num_images"] == new.sum()
    expected = overlap.summarize(overlap.take(counts["original"], new))
    assert scores["dice_global"] == expected["dice_global"]
    all_prompts = {record["text"] for record in RECORDS}
    for known in (None, all_prompts):
        assert list(runner.results(counts, RECORDS, known)["conditions"]) == ["original"]


def test_evaluate_writes_consistent_files(tmp_path):
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


def test_figure_rows_are_the_best_the_median_and_the_worst(counts_by_condition):
    counts = counts_by_condition["original"]
    rows = runner.figure_rows(predict, encode, RECORDS, counts, batch_size=4)
    scores = np.sort(np.asarray(overlap.dice(counts)))
    bands = {b: [r["dice"] for r in rows if r["band"] == b] for b in ("best", "median", "worst")}
    assert bands["best"] == pytest.approx(scores[::-1][:3].tolist())
    assert bands["worst"] == pytest.approx(scores[:3].tolist())
    assert scores[5] in bands["median"]
    for row in rows:
        source = next(r for r in RECORDS if r["id"] == row["id"])
        assert row["pred"].shape == source["full_mask"].shape[:2]
        assert row["image"].shape == (*source["full_mask"].shape[:2], 1)


def test_validate_sums_over_batches_and_checks_the_number_of_records():
    def eval_fn(batch):
        return overlap.overlap_sums(predict(batch), batch["mask"], batch["valid"])

    texts = encode([r["text"] for r in RECORDS])
    scores = runner.validate(eval_fn, RECORDS, texts, batch_size=4)
    masks = np.stack([r["mask"] for r in RECORDS])
    probs = predict({"image": np.zeros((11, SIZE, SIZE, 1)), "text_ids": texts["text_ids"]})
    assert scores == pytest.approx(overlap.summarize(overlap.count_pixels(probs >= 0.5, masks)))

    def eval_padding(batch):
        return overlap.overlap_sums(predict(batch), batch["mask"], batch["valid"] & False | True)

    with pytest.raises(AssertionError, match="12 of 11"):
        runner.validate(eval_padding, RECORDS, texts, batch_size=4)


def test_mean_masks_are_means_over_all_images_and_per_prompt():
    prior, table = baselines.mean_masks(RECORDS)
    masks = np.stack([r["mask"][..., 0] for r in RECORDS]).astype(float)
    np.testing.assert_allclose(prior, masks.mean(0))
    np.testing.assert_allclose(table[RIGHT], masks[1::2].mean(0))


def test_the_per_prompt_baseline_beats_the_mean_mask():
    unseen = {**RECORDS[0], "text": "a new prompt"}
    counts = baselines.image_free(RECORDS[:8], RECORDS[8:], [*RECORDS, unseen])
    mean_mask = overlap.summarize(counts["mean_mask"])
    per_prompt = overlap.summarize(counts["mean_mask_per_prompt"])
    assert per_prompt["dice_global"] > mean_mask["dice_global"] + 0.1
    assert counts["mean_mask"].intersection[-1] == counts["mean_mask_per_prompt"].intersection[-1]


def test_corruptions_are_seeded_by_image_id_and_jpeg_is_applied_on_the_host():
    batches = {}

    def make(corruption):
        def recording_predict(batch):
            name = "jpeg" if corruption is None else "device"
            batches.setdefault(name, []).append(batch)
            return predict(batch)

        return recording_predict

    arguments = {"names": ("gamma", "jpeg"), "severities": (2, 5), "batch_size": 4}
    counts = runner.evaluate_corruptions(make, encode, RECORDS, **arguments)
    assert {name: list(rows) for name, rows in counts.items()} == {"gamma": [2, 5], "jpeg": [2, 5]}
    hashes = np.concatenate([batch["image_hash"] for batch in batches["device"][:3]])[
        : len(RECORDS)
    ]
    np.testing.assert_array_equal(hashes, label_subset.hash_ids([r["id"] for r in RECORDS]))
    images = np.concatenate([batch["image"] for batch in batches["jpeg"][3:]])[: len(RECORDS)]
    compressed = np.stack([corruptions.jpeg(record["image"], 5) for record in RECORDS])
    np.testing.assert_array_equal(images, compressed)

    scores = runner.corruption_results(counts)
    expected = overlap.summarize(runner.overlap_at_mask_size(predict, RECORDS, encode(TEXTS), 4))
    for name in ("gamma", "jpeg"):
        for severity in ("2", "5"):
            assert scores[name][severity]["dice_global"] == expected["dice_global"]
    assert scores["mean"]["dice_mean"] == pytest.approx(expected["dice_mean"])
