"""Figures, curves and tables of the reports: pixels, sizes and cells."""

from __future__ import annotations

import csv
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from biclip_jax.evaluation.report import figures, plots, tables
from biclip_jax.evaluation.report.figures import MASK_COLOR, PRED_COLOR


def box(top: int, bottom: int, left: int, right: int, size: int = 40) -> np.ndarray:
    region = np.zeros((size, size, 1), bool)
    region[top:bottom, left:right] = True
    return region


def case(band: str, **changes) -> dict:
    rng = np.random.default_rng(0)
    row = {
        "band": band,
        "id": "case_1",
        "image": rng.integers(0, 200, (40, 40, 1), np.uint8),
        "mask": box(5, 20, 5, 20),
        "pred": box(8, 24, 8, 24),
        "dice": 0.75,
        "text": "Unilateral pulmonary infection, one infected area, lower left lung.",
    }
    return {**row, **changes}


def read_png(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_overlay_draws_outline_and_fill_only():
    image = np.full((40, 40), 100, np.uint8)
    drawn = figures.overlay(image, box(2, 10, 2, 10), box(20, 30, 20, 30), alpha=0.5)
    assert drawn.shape == (40, 40, 3) and drawn.dtype == np.uint8
    assert tuple(drawn[2, 5]) == tuple(drawn[9, 9]) == MASK_COLOR
    assert tuple(drawn[5, 5]) == (100, 100, 100), "the reference is not filled"
    assert tuple(drawn[20, 25]) == PRED_COLOR
    assert tuple(drawn[25, 25]) == (165, 130, 50)  # half 100, half orange, rounded to even
    assert tuple(drawn[35, 35]) == (100, 100, 100)
    assert (image == 100).all(), "the input image is unchanged"


def test_overlay_outline_has_the_expected_number_of_pixels():
    drawn = figures.overlay(np.zeros((40, 40), np.uint8), box(2, 12, 2, 12))
    assert (drawn == MASK_COLOR).all(-1).sum() == 4 * 10 - 4
    rim = figures.overlay(np.zeros((40, 40), np.uint8), np.ones((40, 40)))
    assert (rim == MASK_COLOR).all(-1).sum() == 4 * 40 - 4


def test_overlay_draws_the_reference_over_the_prediction():
    same = box(5, 15, 5, 15)
    drawn = figures.overlay(np.zeros((40, 40), np.uint8), same, same)
    assert tuple(drawn[5, 10]) == MASK_COLOR and drawn[10, 10].any()


@pytest.mark.parametrize(("size", "thickness"), [(40, 1), (224, 1), (320, 2), (640, 4)])
def test_outline_thickness_grows_with_the_image(size, thickness):
    quarter = box(size // 4, size // 2, size // 4, size // 2, size)
    drawn = figures.overlay(np.zeros((size, size), np.uint8), quarter)
    column = (drawn[:, size * 3 // 8] == MASK_COLOR).all(-1)
    assert column.sum() == 2 * thickness


def test_overlay_keeps_rgb_and_rejects_other_sizes():
    image = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    np.testing.assert_array_equal(figures.overlay(image), image)
    np.testing.assert_array_equal(figures.overlay(image, np.zeros((8, 9)), np.zeros((8, 9))), image)
    with pytest.raises(ValueError, match=r"pred \(9, 8\).*\(8, 9\)"):
        figures.overlay(image, pred=np.zeros((9, 8)))


def test_figure_has_the_colors_and_grows_with_the_prompt(tmp_path):
    heights = []
    for text in ("short", "a prompt of many words " * 40, "x" * 900):
        figures.overlay_figure([case("best", text=text)], tmp_path / "page.png", "Title")
        page = read_png(tmp_path / "page.png")
        heights.append(page.shape[0])
        assert (page == MASK_COLOR).all(-1).sum() > 600
        assert (page == PRED_COLOR).all(-1).sum() > 600
        margin = np.concatenate([page[:20].ravel(), page[-20:].ravel(), page[:, -20:].ravel()])
        assert (margin == 255).all(), "nothing exceeds the figure"
    assert heights[0] < heights[1] and heights[0] < heights[2]
    assert [path.name for path in tmp_path.iterdir()] == ["page.png"]


def test_figure_orders_the_bands_and_wraps_after_three_cells(tmp_path):
    shades = {"worst": 30, "median": 60, "best": 90}
    rows = [
        case(band, image=np.full((40, 40), shade, np.uint8))
        for band, shade in shades.items()
        for _ in range(4)
    ]
    figures.overlay_figure(rows, tmp_path / "page.png", "Title")
    page = read_png(tmp_path / "page.png")
    inside = 2 * figures.GAP + figures.IMAGE_SIZE // 2  # within the first image of each row
    reds = page[:, inside, 0]
    tall = [shade for shade in (90, 60, 30) if (reds == shade).sum() >= 2 * figures.IMAGE_SIZE]
    assert tall == [90, 60, 30], "two rows of images per band"
    assert all(
        np.flatnonzero(reds == above)[0] < np.flatnonzero(reds == below)[0]
        for above, below in ((90, 60), (60, 30))
    )


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_bands_are_the_best_median_and_worst_scores(count):
    scores = np.random.default_rng(count).permutation(count) / 10
    bands = {band: scores[rows].tolist() for band, rows in figures.bands(scores.tolist()).items()}
    assert bands["best"] == sorted(scores, reverse=True)[:3]
    assert bands["worst"] == sorted(scores)[:3]
    assert np.sort(scores)[count // 2] in bands["median"]


def test_figure_accepts_unusual_cases_and_rejects_unknown_bands(tmp_path):
    wide = {name: case("median")[name][:10] for name in ("image", "mask", "pred")}
    rows = [case("median", text="", dice=None, **wide), case("worst", id="i" * 200)]
    figures.overlay_figure(rows, tmp_path / "page.png", "A headline " * 30)
    assert read_png(tmp_path / "page.png").shape[0] > 2 * figures.IMAGE_SIZE
    with pytest.raises(ValueError, match="'good'"):
        figures.overlay_figure([case("good")], tmp_path / "bad.png", "Title")
    assert not (tmp_path / "bad.png").exists()


def test_uncertainty_figure_has_four_tiles_per_case_with_the_entropy_last(tmp_path):
    flat = {"image": np.zeros((40, 40), np.uint8), "mask": np.zeros((40, 40), bool)}
    certain, uncertain = np.zeros((40, 40)), np.full((40, 40), np.log(2))
    rows = [
        case("best", uncertainty=certain, **flat),
        case("worst", uncertainty=uncertain, dice=None),
    ]
    figures.uncertainty_figure(rows, tmp_path / "page.png", "Title")
    page = read_png(tmp_path / "page.png")
    side, gap = figures.IMAGE_SIZE, figures.GAP
    assert page.shape[1] == 4 * side + 7 * gap
    tile = 2 * gap + np.arange(4) * (side + gap)
    heat = page[:, tile[3] + side // 2]
    yellow = (heat[:, 0] > 240) & (heat[:, 1] > 240) & (heat[:, 2] > 140) & (heat[:, 2] < 180)
    assert yellow.sum() == side, "only one case has entropy ln 2 everywhere"
    assert np.flatnonzero(yellow)[0] > page.shape[0] // 2
    orange = np.argwhere((page == PRED_COLOR).all(-1))[:, 1]
    green = np.argwhere((page == MASK_COLOR).all(-1))[:, 1]
    assert ((orange >= tile[1]) & (orange < tile[1] + side)).all() and len(orange)
    assert ((green >= tile[2]) & (green < tile[2] + side)).all() and len(green)


@pytest.mark.parametrize("text", ["", "one", "some words to wrap " * 9, "w" * 300, "a " + "b" * 99])
def test_wrapped_text_fits_the_width_and_is_complete(text, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, xy, line, font, fill: drawn.append((xy, line, font.getlength(line))),
    )
    block = figures._text_block(text, width=150, size=16)
    assert "".join(line for _, line, _ in drawn).replace(" ", "") == text.replace(" ", "")
    assert all(length <= 150 for _, _, length in drawn)
    tops = [xy[1] for xy, _, _ in drawn]
    assert block.width == 150 and block.height == len(tops) * (block.height // len(tops))
    assert all(later - top >= 16 for top, later in itertools.pairwise(tops))


def lines() -> list[dict]:
    train = [{"step": s, "split": "train", "loss": 2 / (s + 1), "lr": 1e-4} for s in range(30)]
    values = (0.1, 0.8, 0.6)
    val = [
        {"step": 10 * i, "split": "val", "dice_global": v, "dice_mean": v - 0.05}
        for i, v in enumerate(values)
    ]
    return train + val


def drawn_panels(monkeypatch, metrics, path):
    """Returns the axes of plot_curves, recorded when the figure is saved."""
    from matplotlib.figure import Figure

    saved = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k))
    )
    plots.plot_curves(metrics, path)
    return saved[0].axes


def test_curves_show_the_values_and_mark_the_best(tmp_path, monkeypatch):
    losses, scores = drawn_panels(monkeypatch, lines(), tmp_path / "sub" / "curves.png")
    np.testing.assert_allclose(losses.lines[0].get_ydata(), 2 / (np.arange(30) + 1))
    assert losses.get_yscale() == "log" and scores.get_yscale() == "linear"
    labels = [text.get_text() for text in scores.get_legend().get_texts()]
    assert labels == [
        "dice_global: best 0.8000 at step 10",
        "dice_mean: best 0.7500 at step 10",
    ]
    assert read_png(tmp_path / "sub" / "curves.png").shape == (504, 1320, 3)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["curves.png"]


def test_curves_use_the_last_value_of_a_repeated_step_and_omit_missing_values(
    tmp_path, monkeypatch
):
    metrics = [
        {"step": 1, "split": "train", "loss": 5.0},
        {"step": 2, "split": "train", "loss": float("nan"), "loss_gen": None},
        {"step": 3, "split": "train", "loss": 4.0},
        {"step": 1, "split": "train", "loss": 3.0},
        {"step": 4, "note": "no split"},
    ]
    losses, scores = drawn_panels(monkeypatch, metrics, tmp_path / "curves.png")
    assert len(losses.lines) == 1 and losses.get_yscale() == "linear"
    np.testing.assert_array_equal(losses.lines[0].get_xydata(), [[1, 3], [3, 4]])
    assert [text.get_text() for text in scores.texts] == ["no data"]
    plots.plot_curves([], tmp_path / "empty.png")


def test_csv_round_trip_and_formula_escape(tmp_path):
    rows = [
        {"id": "=cmd|x", "dice": np.float32(0.5), "text": 'two, "areas"\nbelow', "n": np.int64(3)},
        {"id": "a", "dice": -0.25, "text": "@SUM(A1)", "changed": True},
        {"id": "+1", "dice": np.float64(0.1), "text": "-2 lungs", "n": None},
        {"id": "\tx", "text": "a = b"},
    ]
    path = tmp_path / "out" / "rows.csv"
    tables.write_csv(path, rows)
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == ["id", "dice", "text", "n", "changed"]
    assert [row["id"] for row in read] == ["'=cmd|x", "a", "'+1", "'\tx"]
    assert [row["dice"] for row in read] == ["0.5", "-0.25", "0.1", ""]
    assert [row["text"] for row in read] == [rows[0]["text"], "'@SUM(A1)", "'-2 lungs", "a = b"]
    assert [row["n"] for row in read] == ["3", "", "", ""] and read[1]["changed"] == "True"
    assert [child.name for child in path.parent.iterdir()] == ["rows.csv"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    path = tmp_path / "rows.csv"
    tables.write_csv(path, [{"a": 1}])
    with pytest.raises(RuntimeError, match="no text"):
        tables.write_csv(path, [{"a": 2}, {"a": Unprintable()}])
    assert path.read_text() == "a\n1\n"
    assert [child.name for child in tmp_path.iterdir()] == ["rows.csv"]


def test_table_is_aligned():
    rows = [
        {"name": "BiCLIP", "dice": 0.90591, "n": 2113, "lr": 1e-4},
        {"name": "U\nNet", "dice": None, "n": 5, "lr": 0.0},
    ]
    assert tables.format_table(rows, ["name", "dice", "n", "lr"]).split("\n") == [
        "name      dice     n        lr",
        "------  ------  ----  --------",
        "BiCLIP  0.9059  2113  1.00e-04",
        "U Net        -     5    0.0000",
    ]
    assert tables.format_table([], ["a", "bc"]) == "a  bc\n-  --"
