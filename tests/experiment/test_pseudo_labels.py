"""Pseudo-labels from teachers: values, storage and invalid teachers."""

import json
import shutil

import numpy as np
import pytest

from biclip_jax import inference
from biclip_jax.core import config as config_lib
from biclip_jax.core.errors import UserError
from biclip_jax.data import pipeline, text
from biclip_jax.experiment import pseudo_labels


@pytest.fixture
def student(trained, smoke_config, tmp_path):
    """Config with two copies of the shared model as teachers, and its unlabelled records."""
    cache = f"--config.data.cache_dir={smoke_config.data.cache_dir}"
    half = ["--config.data.label_fraction=0.5", "--config.num_steps=2", "--config.final_test=false"]
    teachers = f"--config.data.teachers={tmp_path / 'one'}, {tmp_path / 'two'}"
    for name in ("one", "two"):
        shutil.copytree(trained / "model", tmp_path / name / "model")
    config = config_lib.load_config("default:smoke,semi", [cache, *half, teachers])
    data = config.data.to_dict()
    return config, pipeline.open_unlabelled(pipeline.prepare(data, 56), data, 56)


def test_masks_are_the_thresholded_mean_of_the_teachers(student, trained, tmp_path, monkeypatch):
    config, records = student
    assert not any(record["mask"].any() for record in records)
    # Images are predicted one at a time; a second teacher disagrees.
    segmenter = inference.load(trained)
    probabilities = [segmenter.predict(r["image"], r["text"]).probability for r in records]
    other = 1 - np.median(probabilities)
    original = pseudo_labels.open_teacher

    def open_teacher(folder, *args):
        if folder.endswith("one"):
            return original(folder, *args)
        return lambda records: np.full((len(records), 56, 56, 1), other)

    monkeypatch.setattr(pseudo_labels, "open_teacher", open_teacher)
    labelled = pseudo_labels.add_pseudo_labels(records, config, tmp_path)
    expected = (np.stack(probabilities)[..., None] + other) / 2
    masks = np.stack([record["mask"] for record in labelled])
    assert masks.shape == (16, 56, 56, 1) and masks.dtype == np.uint8
    assert 0 < masks.mean() < 1
    clear = np.abs(expected - 0.5) > 1e-5
    np.testing.assert_array_equal(masks[clear], (expected >= 0.5)[clear])
    for before, after in zip(records, labelled, strict=True):
        assert before["id"] == after["id"] and before["text"] == after["text"]


def test_teacher_flip_tta_averages_over_the_flipped_image(student, trained):
    config, records = student
    segmenter = inference.load(trained)

    def probability(image, prompt):
        return segmenter.predict(np.ascontiguousarray(image), prompt).probability

    plain = [probability(r["image"], r["text"]) for r in records]
    flipped = [
        probability(r["image"][:, ::-1], text.swap_sides(r["text"]))[:, ::-1] for r in records
    ]
    folder = str(trained / "model")
    single = pseudo_labels.open_teacher(folder, records, config)(records)
    np.testing.assert_allclose(single[..., 0], plain, atol=1e-5)
    config.data.teacher_flip_tta = True
    both = pseudo_labels.open_teacher(folder, records, config)(records)
    assert both.shape == (16, 56, 56, 1) and both.dtype == np.float32
    assert not np.allclose(both, single, atol=1e-3)
    np.testing.assert_allclose(both[..., 0], np.mean([plain, flipped], 0), atol=1e-5)


def test_records_are_unchanged_without_teachers(student, tmp_path):
    config, records = student
    config.data.teachers = ""
    assert pseudo_labels.add_pseudo_labels(records, config, tmp_path) is records
    config.data.teacher_flip_tta = True
    with pytest.raises(UserError, match=r"data\.teacher_flip_tta: there are no teachers"):
        pseudo_labels.add_pseudo_labels(records, config, tmp_path)


def test_a_resumed_run_reads_the_stored_masks(student, tmp_path, monkeypatch):
    config, records = student
    labelled = pseudo_labels.add_pseudo_labels(records, config, tmp_path)
    monkeypatch.setattr(pseudo_labels.checkpoint, "complete_steps", lambda folder: [folder / "4"])
    monkeypatch.setattr(
        pseudo_labels, "open_teacher", lambda *_: pytest.fail("teacher loaded again")
    )
    stored = pseudo_labels.add_pseudo_labels(records, config, tmp_path)
    for first, second in zip(labelled, stored, strict=True):
        np.testing.assert_array_equal(first["mask"], second["mask"])
    with pytest.raises(
        UserError, match=r"teacher_masks\.npz: holds masks of 16 images, but not of the 8"
    ):
        pseudo_labels.add_pseudo_labels(records[:8], config, tmp_path)
    for content in (b"PK", None):
        (tmp_path / pseudo_labels.MASKS_FILE).unlink()
        if content:
            (tmp_path / pseudo_labels.MASKS_FILE).write_bytes(content)
        with pytest.raises(UserError, match=r"teacher_masks\.npz: missing or damaged"):
            pseudo_labels.add_pseudo_labels(records, config, tmp_path)


def test_masks_without_a_checkpoint_are_predicted_again(student, tmp_path):
    config, records = student
    (tmp_path / pseudo_labels.MASKS_FILE).write_bytes(b"old")
    pseudo_labels.add_pseudo_labels(records, config, tmp_path)
    assert np.load(tmp_path / pseudo_labels.MASKS_FILE)["masks"].shape == (16, 56, 56, 1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.unlabelled", "", r"data\.teachers: .*set data\.unlabelled and"),
        ("loss.pseudo_labels", 0.0, r"data\.teachers: .*loss\.pseudo_labels"),
        ("data.teachers", "nowhere", r"data\.teachers: nowhere: no such folder"),
        ("data.teachers", ",", r"data\.teachers=,: expected comma-separated work directories"),
        ("model.image_size", 112, r"takes images of 56 px, .*expected 112 px, .*as in this run"),
        (
            "data.resize",
            "opencv",
            r"resize 'antialiased'; expected 56 px, resize 'opencv', as in this run",
        ),
    ],
)
def test_rejects_unsuitable_teachers(student, tmp_path, field, value, message):
    config, records = student
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        pseudo_labels.add_pseudo_labels(
            records if field != "data.unlabelled" else [], config, tmp_path
        )


def test_rejects_a_teacher_trained_on_the_unlabelled_images(student, tmp_path):
    config, records = student
    labels = tmp_path / "two/labels.json"
    trained_on = [record["id"] for record in records[:3]]
    labels.write_text(json.dumps({"ids": ["another", *trained_on]}))
    with pytest.raises(UserError, match=r"two was trained on the masks of 3 of the 16 images"):
        pseudo_labels.add_pseudo_labels(records, config, tmp_path)
    labels.write_text("{}")
    with pytest.raises(UserError, match=r"labels\.json: damaged"):
        pseudo_labels.add_pseudo_labels(records, config, tmp_path)
