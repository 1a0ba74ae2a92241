"""Surface metrics of drawn shapes, against values by hand and loops over all pairs of pixels."""

import itertools

import numpy as np
import pytest

from biclip_jax.evaluation.metrics import surface
from tests.evaluation import test_runner as stub

MEASURES = list(surface.MEASURES.values())


def disc(radius, down=0, right=0):
    y, x = np.indices((96, 96))
    return (y - 40 - down) ** 2 + (x - 40 - right) ** 2 < radius**2


def pixels(*positions, size=12):
    mask = np.zeros((size, size), np.uint8)
    mask[tuple(np.transpose(positions))] = 1
    return mask


def blobs(seed):
    """Returns two masks with holes, single pixels, diagonals and foreground at the border."""
    rng = np.random.default_rng(seed)
    rough = rng.random((2, 6, 7)) > 0.5
    fine = np.repeat(np.repeat(rough, 3, 1), 3, 2)
    return fine ^ (rng.random(fine.shape) > 0.95)


@pytest.mark.parametrize(
    ("prediction", "mask", "expected"),
    [
        # Values of MedCLIPSeg's own evaluation; the last one is our 2-D boundary metric.
        (disc(20, 4, 3), disc(20), (0.84016064, 0.93266529, 31 / 112)),
        (disc(15), disc(25), (0.52843063, 0.61654169, 0)),
    ],
)
def test_discs_match_the_reference_implementation(prediction, mask, expected):
    scores = [measure(prediction, mask) for measure in MEASURES]
    np.testing.assert_allclose(scores, expected, atol=1e-8)


@pytest.mark.parametrize("measure", MEASURES)
def test_empty_masks_equal_masks_and_disjoint_ones(measure):
    empty, full = np.zeros((96, 96)), disc(20)
    assert measure(empty, empty) == 1
    assert measure(empty, full) == measure(full, empty) == 0
    assert measure(full, full) == pytest.approx(1, abs=1e-9)
    assert measure(disc(5), disc(5, 40)) == 0


@pytest.mark.parametrize("measure", MEASURES)
def test_metrics_are_symmetric_and_independent_of_position(measure):
    a, b = blobs(0)
    score = measure(a, b)
    assert 0 < score < 1
    assert measure(b, a) == pytest.approx(score)
    assert measure(np.pad(a, 4), np.pad(b, 4)) == pytest.approx(score)
    assert measure(a.T, b.T) == pytest.approx(score)
    assert measure(a[::-1], b[::-1]) == pytest.approx(score)


@pytest.mark.parametrize("measure", MEASURES[1:])
def test_a_wider_tolerance_is_never_worse(measure):
    scores = [measure(*blobs(1), tolerance) for tolerance in (0, 1, 2, 4, 40)]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1] == pytest.approx(1)


@pytest.mark.parametrize("measure", MEASURES)
def test_rejects_different_shapes(measure):
    for prediction, mask in ((np.ones((4, 4)), np.ones((4, 5))), (np.ones((4, 4, 1)),) * 2):
        with pytest.raises(ValueError, match="expected one shape"):
            measure(prediction, mask)


def test_dsc_of_two_and_three_pixels():
    score = surface.dsc(pixels((3, 3), (3, 4)), pixels((3, 4), (3, 5), (3, 6)))
    assert score == pytest.approx(2 / 5)


def area(*corners):
    """Returns the area of a flat convex polygon."""
    first, *others = np.array(corners, float)
    pairs = itertools.pairwise(others)
    return sum(np.linalg.norm(np.cross(a - first, b - first)) / 2 for a, b in pairs)


# Areas of the surface through a unit cell, from edge midpoint to edge midpoint.
ONE = area((0.5, 0, 0), (0, 0.5, 0), (0, 0, 0.5))
SIDE = area((0, 0, 0.5), (1, 0, 0.5), (1, 0.5, 0), (0, 0.5, 0))
THREE = area((0, 0, 0.5), (1, 0, 0.5), (0, 1, 0.5)) + area(
    (1, 0, 0.5), (1, 0.5, 0), (0.5, 1, 0), (0, 1, 0.5)
)


def cells(mask):
    """Returns {position: area} of the 2 x 2 x 2 cells of a one-slice volume with a voxel inside."""
    areas = {}
    volume = np.pad(mask[None] != 0, 1)
    for position in np.ndindex(*(n - 1 for n in volume.shape)):
        z, y, x = position
        layer = volume[z : z + 2, y : y + 2, x : x + 2].any(0)
        sizes = {1: ONE, 2: 2 * ONE if layer[0, 0] == layer[1, 1] else SIDE, 3: THREE, 4: 1}
        if layer.any():
            areas[position] = sizes[layer.sum()]
    return areas


def boundary(mask):
    """Returns {position: 1} of the foreground pixels with a background neighbour."""
    padded = np.pad(mask != 0, 1)
    positions = map(tuple, np.argwhere(padded))
    steps = ((0, 1), (0, -1), (1, 0), (-1, 0))
    return {(y, x): 1 for y, x in positions if not all(padded[y + a, x + b] for a, b in steps)}


def share_within(one, other, tolerance):
    """Returns the share of the weight of both sets within the tolerance of the other set."""
    near = 0
    for weights, others in ((one, other), (other, one)):
        targets = np.array(list(others))
        for position, weight in weights.items():
            near += weight * (((targets - position) ** 2).sum(1).min() <= tolerance**2)
    return near / (sum(one.values()) + sum(other.values()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_metrics_match_loops_over_all_pairs(seed, tolerance):
    a, b = blobs(seed)
    plate = share_within(cells(a), cells(b), tolerance)
    assert surface.surface_dice_plate(a, b, tolerance) == pytest.approx(plate)
    boundaries = share_within(boundary(a), boundary(b), tolerance)
    assert surface.surface_dice(a, b, tolerance) == pytest.approx(boundaries)


def test_cells_of_single_pixels_by_hand():
    # A pixel touches four cells; adjacent pixels share two cells, diagonal ones share one.
    one = pixels((3, 3))
    assert surface.surface_dice_plate(one, pixels((3, 4)), 0) == pytest.approx(1 / 2)
    assert surface.surface_dice_plate(one, pixels((4, 4)), 0) == pytest.approx(1 / 4)
    scores = [surface.surface_dice_plate(one, pixels((3, x)), 2) for x in (5, 6, 7)]
    assert scores == pytest.approx([1, 1 / 2, 0])
    assert surface.surface_dice(one, pixels((3, 5)), 2) == 1
    assert surface.surface_dice(one, pixels((3, 6)), 2) == 0


def test_a_split_is_scored_at_the_size_of_each_mask():
    columns = surface.per_image(stub.predict, stub.encode, stub.RECORDS, batch_size=4)
    assert list(columns) == ["dsc", "nsd_plate", "nsd_2d"]
    assert {len(values) for values in columns.values()} == {len(stub.RECORDS)}
    # The predicted box is 2 x 3 of 8 x 8 pixels: 4 x 6 of 16 x 16, from row 4 on.
    box = np.zeros((16, 16))
    box[4:8, 8:14] = 1
    mask = stub.RECORDS[1]["full_mask"][..., 0]
    assert mask.shape == box.shape
    expected = [measure(box, mask) for measure in MEASURES]
    assert [values[1] for values in columns.values()] == expected
    assert 0.8 < expected[0] < 1


def test_summarize_returns_means_and_settings():
    section = surface.summarize({"dsc": [0.5, 1.0], "nsd_plate": [0.0, 1.0], "nsd_2d": [0, 0]})
    assert section["size"] == "each mask's own size, masks resized by nearest neighbour"
    numbers = {name: value for name, value in section.items() if name != "size"}
    assert numbers == {
        "dsc": 0.75,
        "nsd_plate": 0.5,
        "nsd_2d": 0,
        "tolerance": 2,
        "num_images": 2,
    }
