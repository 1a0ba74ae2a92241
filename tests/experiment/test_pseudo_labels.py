"""Teachers' masks: what they are, that they are kept, and what is refused."""

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
    """A configuration with two copies of the shared model as teachers, its unlabelled records."""
    cache = f"--config.data.cache_dir={smoke_config.data.cache_dir}"
    half = ["--config.data.label_fraction=0.5", "--config.num_steps=2", "--config.final_test=false"]
    teachers = f"--config.data.teachers={tmp_path / 'one'}, {tmp_path / 'two'}"
    for name in ("one", "two"):
        shutil.copytree(trained / "model", tmp_path / name / "model")
    config = config_lib.load_config("default:smoke,semi", [cache, *half, teachers])
    data = config.data.to_dict()
    return config, pipeline.open_unlabelled(pipeline.prepare(data, 56), data, 56)


def test_masks_are_the_teachers_mean_at_one_half(student, trained, tmp_path, monkeypatch):
    config, records = student
    assert not any(record["mask"].any() for record in records)
    # Each picture by itself, as a user has it, and a second teacher who is of another opinion.
    segmenter = inference.load(trained)
    alone = [segmenter.predict(r["image"], r["text"]).probability for r in records]
    other = 1 - np.median(alone)
    ask = pseudo_labels.open_teacher

    def open_teacher(folder, *given):
        if folder.endswith("one"):
            return ask(folder, *given)
        return lambda records: np.full((len(records), 56, 56, 1), other)

    monkeypatch.setattr(pseudo_labels, "open_teacher", open_teacher)
    taught = pseudo_labels.add_pseudo_labels(records, config, tmp_path)
    expected = (np.stack(alone)[..., None] + other) / 2
    masks = np.stack([record["mask"] for record in taught])
    assert masks.shape == (16, 56, 56, 1) and masks.dtype == np.uint8
    assert 0 < masks.mean() < 1
    clear = np.abs(expected - 0.5) > 1e-5
    np.testing.assert_array_equal(masks[clear], (expected >= 0.5)[clear])
    for before, after in zip(records, taught, strict=True):
        assert before["id"] == after["id"] and before["text"] == after["text"]


def test_teachers_answer_mirror_images_too_where_asked(student, trained):
    config, records = student
    segmenter = inference.load(trained)

    def alone(image, prompt):
        return segmenter.predict(np.ascontiguousarray(image), prompt).probability

    plain = [alone(r["image"], r["text"]) for r in records]
    swapped = [alone(r["image"][:, ::-1], text.swap_sides(r["text"]))[:, ::-1] for r in records]
    folder = str(trained / "model")
    found = pseudo_labels.open_teacher(folder, records, config)(records)
    np.testing.assert_allclose(found[..., 0], plain, atol=1e-5)
    config.data.teacher_flip_tta = True
    both = pseudo_labels.open_teacher(folder, records, config)(records)
    assert both.shape == (16, 56, 56, 1) and both.dtype == np.float32
    assert not np.allclose(both, found, atol=1e-3)
    np.testing.assert_allclose(both[..., 0], np.mean([plain, swapped], 0), atol=1e-5)


def test_without_teachers_nothing_changes(student, tmp_path):
    config, records = student
    config.data.teachers = ""
    assert pseudo_labels.add_pseudo_labels(records, config, tmp_path) is records
    config.data.teacher_flip_tta = True
    with pytest.raises(UserError, match=r"data\.teacher_flip_tta: there are no teachers"):
        pseudo_labels.add_pseudo_labels(records, config, tmp_path)


def test_masks_are_kept_for_a_run_that_goes_on(student, tmp_path, monkeypatch):
    config, records = student
    taught = pseudo_labels.add_pseudo_labels(records, config, tmp_path)
    monkeypatch.setattr(pseudo_labels.checkpoint, "complete_steps", lambda folder: [folder / "4"])
    monkeypatch.setattr(pseudo_labels, "open_teacher", lambda *_: pytest.fail("asked again"))
    kept = pseudo_labels.add_pseudo_labels(records, config, tmp_path)
    for first, second in zip(taught, kept, strict=True):
        np.testing.assert_array_equal(first["mask"], second["mask"])
    with pytest.raises(UserError, match=r"teacher_masks\.npz: masks of 16 pictures that are not"):
        pseudo_labels.add_pseudo_labels(records[:8], config, tmp_path)
    for harm in (b"PK", None):
        (tmp_path / pseudo_labels.MASKS_FILE).unlink()
        if harm:
            (tmp_path / pseudo_labels.MASKS_FILE).write_bytes(harm)
        with pytest.raises(UserError, match=r"teacher_masks\.npz: missing or damaged"):
            pseudo_labels.add_pseudo_labels(records, config, tmp_path)


def test_masks_of_a_start_that_saved_nothing_are_made_again(student, tmp_path):
    config, records = student
    (tmp_path / pseudo_labels.MASKS_FILE).write_bytes(b"old")
    pseudo_labels.add_pseudo_labels(records, config, tmp_path)
    assert np.load(tmp_path / pseudo_labels.MASKS_FILE)["masks"].shape == (16, 56, 56, 1)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("data.unlabelled", "", r"data\.teachers: .*set data\.unlabelled and"),
        ("loss.pseudo_labels", 0.0, r"data\.teachers: .*loss\.pseudo_labels"),
        ("data.teachers", "nowhere", r"data\.teachers: nowhere: no such folder"),
        ("data.teachers", ",", r"data\.teachers=,: expected work directories"),
        ("model.image_size", 112, r"takes pictures of 56 px, .* this run has 112 px"),
        ("data.resize", "opencv", r"resized antialiased, and this run has 56 px, opencv"),
    ],
)
def test_what_cannot_teach_is_refused(student, tmp_path, field, value, said):
    config, records = student
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=said):
        pseudo_labels.add_pseudo_labels(
            records if field != "data.unlabelled" else [], config, tmp_path
        )


def test_a_teacher_that_has_learned_the_masks_is_refused(student, tmp_path):
    config, records = student
    labels = tmp_path / "two/labels.json"
    learned = [record["id"] for record in records[:3]]
    labels.write_text(json.dumps({"ids": ["another", *learned]}))
    with pytest.raises(UserError, match=r"two has learned the masks of 3 of the 16 pictures"):
        pseudo_labels.add_pseudo_labels(records, config, tmp_path)
    labels.write_text("{}")
    with pytest.raises(UserError, match=r"labels\.json: damaged"):
        pseudo_labels.add_pseudo_labels(records, config, tmp_path)
