"""Resizing against a few numbers from OpenCV, and against OpenCV itself if it is installed."""

import numpy as np
import pytest

from biclip_jax.data import image_io, opencv_resize

IMAGE = np.array(
    [
        [95, 130, 194, 217, 207, 235, 15],
        [163, 33, 215, 217, 130, 248, 189],
        [16, 69, 184, 232, 205, 78, 169],
        [61, 125, 10, 29, 240, 66, 19],
        [182, 39, 59, 4, 59, 81, 222],
    ],
    np.uint8,
)[..., None]
# cv2.resize(IMAGE, (4, 3)), and the same with interpolation=cv2.INTER_NEAREST
BILINEAR = [[110, 203, 186, 135], [36, 190, 208, 135], [114, 39, 106, 125]]
NEAREST = [[95, 130, 217, 235], [163, 33, 217, 248], [61, 125, 29, 66]]


def test_matches_numbers_from_opencv():
    assert opencv_resize.bilinear(IMAGE, 3, 4)[..., 0].tolist() == BILINEAR
    assert opencv_resize.nearest(IMAGE, 3, 4)[..., 0].tolist() == NEAREST


def test_nearest_keeps_dtype_and_accepts_two_axes():
    mask = IMAGE[..., 0] > 127
    actual = opencv_resize.nearest(mask, 3, 4)
    assert actual.dtype == bool
    np.testing.assert_array_equal(actual, np.array(NEAREST) > 127)


def test_integer_upscaling_repeats_and_constants_are_preserved():
    np.testing.assert_array_equal(
        opencv_resize.nearest(IMAGE, 15, 14), IMAGE.repeat(3, 0).repeat(2, 1)
    )
    for value in (0, 1, 128, 255):
        image = np.full((37, 51, 3), value, np.uint8)
        assert (opencv_resize.bilinear(image, 30, 70) == value).all()


def test_downscaling_interpolates_two_pixels_per_axis_without_averaging():
    board = (np.indices((30, 30)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    assert set(np.unique(opencv_resize.bilinear(board, 10, 10))) == {0, 255}
    assert len(np.unique(image_io.resize_image(board, 10))) > 2


def test_matches_opencv_on_any_shape():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for case in range(300):
        height, width = (int(n) for n in rng.integers(1, 160, 2))
        shape = (2 * height, 2 * width) if case % 10 == 0 else tuple(rng.integers(1, 400, 2))
        image = rng.integers(0, 256, (*shape, rng.choice([1, 3])), dtype=np.uint8)
        for ours, flag in (
            (opencv_resize.bilinear, cv2.INTER_LINEAR),
            (opencv_resize.nearest, cv2.INTER_NEAREST),
        ):
            theirs = cv2.resize(image, (width, height), interpolation=flag)
            actual = ours(image, height, width)
            np.testing.assert_array_equal(actual, theirs.reshape(actual.shape))
