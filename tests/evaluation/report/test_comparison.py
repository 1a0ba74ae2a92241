"""Rows of a comparison, against the statistics module, and their tables."""

import statistics

import pytest

from biclip_jax.core import config as config_lib
from biclip_jax.evaluation.report import comparison

SCORES = (0.62, 0.6, 0.7)


def score(value):
    return dict.fromkeys(comparison.METRICS, value)


def row(**more):
    fields = {
        "variant": "full",
        "label_fraction": 0.05,
        "num_labelled": 286,
        "image_encoder": "cnn",
        "empty_text": comparison.over_seeds([score(0.5)]),
        "seeds": {"0": {"run": "full/seed_0"}},
    }
    return fields | more


def test_over_seeds_returns_mean_and_sample_deviation():
    summary = comparison.over_seeds([{**score(value), "images": 3} for value in SCORES])
    assert set(summary) == set(comparison.METRICS)
    for value in summary.values():
        assert value["mean"] == pytest.approx(statistics.fmean(SCORES))
        assert value["sd"] == pytest.approx(statistics.stdev(SCORES))
    assert comparison.over_seeds([score(0.3)])["dice_mean"] == {"mean": 0.3, "sd": None}


def test_evaluations_are_averaged_over_the_seeds_per_section():
    runs = [
        {
            "num_images": 500,
            "conditions": {"original": score(value), "empty": score(value / 2)},
            "corruptions": {"jpeg": {"2": score(value / 4)}, "mean": score(value / 8)},
            "flip_consistency": score(value / 16),
        }
        for value in (0.4, 0.8)
    ]
    evaluation = comparison.summarize_evaluations(runs)
    parts = [evaluation["conditions"]["original"], evaluation["conditions"]["empty"]]
    parts += [
        evaluation["corruptions"]["jpeg"]["2"],
        evaluation["corruptions"]["mean"],
        evaluation["flip_consistency"],
    ]
    means = [part["iou_global"]["mean"] for part in parts]
    assert means == pytest.approx([0.6, 0.3, 0.15, 0.075, 0.0375])
    assert evaluation["num_images"] == 500
    plain = [{name: run[name] for name in ("num_images", "conditions")} for run in runs]
    assert set(comparison.summarize_evaluations(plain)) == {"num_images", "conditions"}


def test_tables_are_in_percent_and_link_the_runs():
    spread = comparison.over_seeds([score(0.6), score(0.8)])
    corrupted = {"corruptions": {"mean": comparison.over_seeds([score(0.25)])}}
    two = {"0": {"run": "full/seed_0"}, "1": {"run": "full/seed_1"}}
    rows = [
        row(**comparison.over_seeds([score(0.7)])),
        row(**spread, evaluation=corrupted, seeds=two),
    ]
    lines = comparison.markdown(rows).splitlines()
    assert lines[2].startswith("| 5 % (286) | full | cnn | 70.00 | 70.00 |")
    assert lines[2].endswith("| 50.00 | - | 1 | [0](full/seed_0) |")
    assert lines[3].endswith("| 25.00 | 2 | [0](full/seed_0) [1](full/seed_1) |")
    assert "| 70.00 ± 14.14 |" in lines[3]
    printed = comparison.table(rows)
    assert "5 % (286)" in printed and "70.00 ± 14.14" in printed


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("qata:small,full", "cnn"),
        ("qata:small,ef_unet", "-"),
        ("medclipseg", "unimedclip"),
    ],
)
def test_image_encoder_is_named_only_if_the_image_refines_the_text(config, expected):
    model = config_lib.load_config(config, []).to_dict()["model"]
    assert comparison.image_encoder(model) == expected
