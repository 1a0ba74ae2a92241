"""Teachers' masks: what they are, that they are kept, and what is refused."""

import json

import numpy as np
import pytest

from biclip_jax import cli, inference, teaching, train
from biclip_jax.data import pipeline
from biclip_jax.errors import UserError


@pytest.fixture
def student(trained, smoke_config):
    """A configuration that learns from the shared run, and its unlabelled records."""
    cache = f"--config.data.cache_dir={smoke_config.data.cache_dir}"
    half = ["--config.data.label_fraction=0.5", "--config.num_steps=2", "--config.final_test=false"]
    config = cli.load_config(
        "default:smoke,semi", [cache, *half, f"--config.data.teachers={trained},{trained}"]
    )
    data = config.data.to_dict()
    return config, pipeline.open_unlabelled(pipeline.prepare(data, 56), data, 56)


def test_masks_are_the_teachers_mean_at_one_half(student, trained, tmp_path, monkeypatch):
    config, records = student
    assert not any(record["mask"].any() for record in records)
    # Each picture by itself, as a user has it, and a second teacher who is of another opinion.
    predictor = inference.load(trained)
    alone = [predictor.predict(r["image"], r["text"]).probability for r in records]
    other = 1 - np.median(alone)
    ask = teaching.probabilities
    answers = iter([ask, lambda folder, records, config: np.full((16, 56, 56, 1), other)])
    monkeypatch.setattr(teaching, "probabilities", lambda *args: next(answers)(*args))
    taught = teaching.with_masks(records, config, tmp_path)
    expected = (np.stack(alone)[..., None] + other) / 2
    masks = np.stack([record["mask"] for record in taught])
    assert masks.shape == (16, 56, 56, 1) and masks.dtype == np.uint8
    assert 0 < masks.mean() < 1
    clear = np.abs(expected - 0.5) > 1e-5
    np.testing.assert_array_equal(masks[clear], (expected >= 0.5)[clear])
    for before, after in zip(records, taught, strict=True):
        assert before["id"] == after["id"] and before["text"] == after["text"]


def test_without_teachers_nothing_changes(student, tmp_path):
    config, records = student
    config.data.teachers = ""
    assert teaching.with_masks(records, config, tmp_path) is records


@pytest.mark.slow
def test_a_run_learns_from_its_teachers_and_goes_on_without_them(student, tmp_path, monkeypatch):
    config, records = student
    config.num_steps, config.eval_every = 4, 2
    train.train_and_evaluate(config, tmp_path / "whole")
    with np.load(tmp_path / "whole" / teaching.FILE) as kept:
        assert kept["ids"].tolist() == [record["id"] for record in records]
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row["loss_pseudo_labels"] for row in rows if row["split"] == "train"]
    assert losses and all(loss > 0 for loss in losses)

    monkeypatch.setattr(teaching, "probabilities", lambda *_: pytest.fail("asked again"))
    train.train_and_evaluate(config, tmp_path / "whole")
    config.data.label_seed = 1
    data = config.data.to_dict()
    others = pipeline.open_unlabelled(pipeline.prepare(data, 56), data, 56)
    with pytest.raises(UserError, match=r"teacher_masks\.npz: masks of 16 other pictures than"):
        teaching.with_masks(others, config, tmp_path / "whole")
    (tmp_path / "whole" / teaching.FILE).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"teacher_masks\.npz: damaged"):
        teaching.with_masks(records, config, tmp_path / "whole")


def test_masks_of_a_start_that_saved_nothing_are_made_again(student, tmp_path):
    config, records = student
    (tmp_path / teaching.FILE).write_bytes(b"old")
    teaching.with_masks(records, config, tmp_path)
    assert np.load(tmp_path / teaching.FILE)["masks"].shape == (16, 56, 56, 1)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("data.unlabelled", "", r"data\.teachers: .*set data\.unlabelled and"),
        ("loss.pseudo_labels", 0.0, r"data\.teachers: .*loss\.pseudo_labels"),
        ("data.teachers", "nowhere", "nowhere"),
        ("model.image_size", 112, r"takes pictures of 56 px, .* this run has 112 px"),
        ("data.resize", "opencv", r"resized antialiased, and this run has 56 px, opencv"),
    ],
)
def test_what_cannot_teach_is_refused(student, tmp_path, field, value, said):
    config, records = student
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=said):
        teaching.with_masks(records if field != "data.unlabelled" else [], config, tmp_path)
