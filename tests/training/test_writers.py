"""metrics.jsonl: one line per measurement, without duplicates after a resume."""

import json

import pytest

from biclip_jax.training import writers


def test_written_lines_are_read_back(tmp_path, capsys):
    with writers.Writer(tmp_path, 10, 0) as writer:
        writer.write(2, "train", {"loss": 0.5})
        writer.write(4, "val", {"dice_global": 0.25, "num_images": 3})
    rows = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [
        {"step": 2, "split": "train", "loss": 0.5},
        {"step": 4, "split": "val", "dice_global": 0.25, "num_images": 3},
    ]
    assert "dice_global 0.2500" in capsys.readouterr().out


def test_resume_drops_lines_after_the_checkpoint_and_a_truncated_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "split": "train"}) for s in (2, 4, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 8, "spl')
    with writers.Writer(tmp_path, 10, 4) as writer:
        writer.write(6, "train", {"loss": 1.0})
    assert [row["step"] for row in writers.read_metrics(path)] == [2, 4, 6]


def test_tensorboard_receives_the_values(tmp_path):
    pytest.importorskip("tensorboardX")
    with writers.Writer(tmp_path, 10, 0) as writer:
        writer.write(4, "val", {"dice_global": 0.25})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"val/dice_global" in events.read_bytes()
