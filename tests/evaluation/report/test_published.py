"""Consistency of the published results."""

import pytest

from biclip_jax.evaluation.report import published
from biclip_jax.evaluation.robustness import corruptions


def test_global_iou_follows_from_global_dice_and_mean_iou_lies_above_it():
    checked = 0
    for row in published.RESULTS:
        if row.iou is None:
            continue
        follows = 100 * row.dice / (200 - row.dice)
        if row.kind == "global":
            assert row.iou == pytest.approx(follows, abs=0.06), row
        else:
            # x / (2 - x) is convex: the mean IoU is at least the IoU of the mean Dice.
            assert row.iou >= follows - 0.06, row
        checked += 1
    assert checked >= 8


def test_results_are_unique_have_a_source_and_drop_with_fewer_labels():
    keys = [(r.data, r.method, r.kind, r.labels) for r in published.RESULTS]
    assert len(set(keys)) == len(keys)
    assert all(r.source and r.kind in ("global", "mean") for r in published.RESULTS)
    assert {(r.data, r.num_images) for r in published.RESULTS} == {
        ("qata_cov19", 2113),
        ("mosmed_plus", 273),
    }
    for data in ("qata_cov19", "mosmed_plus"):
        for method in ("BiCLIP", "EF-UNet"):
            rows = [r for r in published.published_on(data) if r.method == method]
            assert [r.labels for r in rows] == [100, 25, 10, 5, 1]
            assert [r.dice for r in rows] == sorted((r.dice for r in rows), reverse=True)


def test_corruption_settings_match_our_severities():
    strengths = {
        ("motion_blur", 2): 7,
        ("motion_blur", 4): 15,
        ("gaussian_noise", 3): 0.1,
        ("low_contrast", 3): 0.5,
    }
    for row in published.published_on_corrupted("qata_cov19"):
        if row.severity is not None:
            strength = corruptions.CORRUPTIONS[row.name].strengths[row.severity - 1]
            assert strength == strengths[row.name, row.severity]
            assert row.setting.split()[-1] == f"{strength:g}"
    assert (
        published.published_on_corrupted("kvasir_seg") == published.published_on("kvasir_seg") == []
    )
