"""OpenCV's own numbers, a few of them copied here, and all of them where it is installed."""

import numpy as np
import pytest

from biclip_jax.data import image_io, opencv_resize

GREY = np.array(
    [
        [95, 130, 194, 217, 207, 235, 15],
        [163, 33, 215, 217, 130, 248, 189],
        [16, 69, 184, 232, 205, 78, 169],
        [61, 125, 10, 29, 240, 66, 19],
        [182, 39, 59, 4, 59, 81, 222],
    ],
    np.uint8,
)[..., None]
# cv2.resize(GREY, (4, 3)), and the same with interpolation=cv2.INTER_NEAREST
BILINEAR = [[110, 203, 186, 135], [36, 190, 208, 135], [114, 39, 106, 125]]
NEAREST = [[95, 130, 217, 235], [163, 33, 217, 248], [61, 125, 29, 66]]


def test_a_few_numbers_of_opencv():
    assert opencv_resize.bilinear(GREY, 3, 4)[..., 0].tolist() == BILINEAR
    assert opencv_resize.nearest(GREY, 3, 4)[..., 0].tolist() == NEAREST


def test_nearest_keeps_dtype_and_takes_two_axes():
    mask = GREY[..., 0] > 127
    found = opencv_resize.nearest(mask, 3, 4)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, np.array(NEAREST) > 127)


def test_enlarging_by_a_whole_number_repeats_and_a_constant_stays():
    np.testing.assert_array_equal(
        opencv_resize.nearest(GREY, 15, 14), GREY.repeat(3, 0).repeat(2, 1)
    )
    for value in (0, 1, 128, 255):
        picture = np.full((37, 51, 3), value, np.uint8)
        assert (opencv_resize.bilinear(picture, 30, 70) == value).all()


def test_shrinking_reads_two_pixels_a_direction_and_is_not_averaged():
    board = (np.indices((30, 30)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    assert set(np.unique(opencv_resize.bilinear(board, 10, 10))) == {0, 255}
    assert len(np.unique(image_io.resize_image(board, 10))) > 2


def test_as_opencv_itself_on_any_shape():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for case in range(300):
        height, width = (int(n) for n in rng.integers(1, 160, 2))
        shape = (2 * height, 2 * width) if case % 10 == 0 else tuple(rng.integers(1, 400, 2))
        picture = rng.integers(0, 256, (*shape, rng.choice([1, 3])), dtype=np.uint8)
        for ours, flag in (
            (opencv_resize.bilinear, cv2.INTER_LINEAR),
            (opencv_resize.nearest, cv2.INTER_NEAREST),
        ):
            theirs = cv2.resize(picture, (width, height), interpolation=flag)
            found = ours(picture, height, width)
            np.testing.assert_array_equal(found, theirs.reshape(found.shape))
