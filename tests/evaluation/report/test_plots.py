"""Reliability diagram and uncertainty maps, checked by their pixels."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from biclip_jax.evaluation.metrics import calibration
from biclip_jax.evaluation.report import plots


def section(scale):
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    y = rng.random(20_000) < p**scale
    counts = calibration.histogram(p, y)
    return calibration.report(counts, counts)


def colored(path, color):
    """Returns rows and columns of the pixels of a color, as fractions of the image."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    hits = np.argwhere(np.abs(pixels - rgb).sum(-1) < 30)
    return hits / pixels.shape[:2]


def test_an_overconfident_model_lies_below_the_diagonal(tmp_path):
    heights = {}
    for name, scale in (("calibrated", 1), ("overconfident", 4)):
        path = tmp_path / f"{name}.png"
        plots.plot_reliability(section(scale), path)
        points = colored(path, plots.AFTER)  # drawn last
        middle = points[(np.abs(points[:, 1] - 0.6) < 0.01) & (points[:, 0] < 0.66)]
        heights[name] = middle[:, 0].mean()
    # Rows count downwards: p^4 in the middle is far below the diagonal.
    assert heights["overconfident"] > heights["calibrated"] + 0.15
    assert not list(tmp_path.glob("*.part"))


def test_empty_bins_have_share_zero():
    rows = [{"low": 0.0, "count": 3}, {"low": 14 / 15, "count": 1}]
    shares = plots._shares(rows)
    assert shares[0] == pytest.approx(0.75) and shares[-1] == pytest.approx(0.25)
    assert len(shares) == 15 and sum(shares) == pytest.approx(1)


def test_uncertainty_maps_have_a_common_scale(tmp_path):
    """A constant map has the color of its value next to any other map; the bar has all colors."""
    inferno = matplotlib.colormaps["inferno"]
    for nats in (0.1, 0.6):
        path = tmp_path / f"{nats}.png"
        maps = {"all": np.full((40, 40), nats), "part": np.full((40, 40), nats / 2)}
        plots.plot_uncertainty(maps, path)
        for value in (nats, nats / 2):
            pixels = colored(path, matplotlib.colors.to_hex(inferno(value / np.log(2))))
            assert len(pixels) > 10_000, value
        for share in (0.05, 0.5, 0.95):
            bar = colored(path, matplotlib.colors.to_hex(inferno(share)))
            assert (bar[:, 1] > 0.8).any(), share
