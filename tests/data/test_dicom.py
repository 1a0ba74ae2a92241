"""DICOM pictures: values worked out by the standard's formulas, and pydicom's own example files."""

import contextlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from biclip_jax.data import dicom, image_io
from biclip_jax.errors import BadImageError

from .fixtures import CT, dicom_file

EXAMPLES = Path(pydicom.__file__).parent / "data/test_files"


VALUES = np.array([[0, 100, 1000], [1024, 1064, 4095]], np.uint16)


def shown(values, center, width):
    """PS3.3, C.11.2.1.2.1: what a LINEAR window makes of values."""
    share = ((np.asarray(values, float) - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1)
    return np.rint(255 * share).astype(np.uint8)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_window_is_of_rescaled_values(tmp_path, compressed):
    fields = {**CT, "WindowCenter": [40, 500], "WindowWidth": [400, 1500]}
    path = dicom_file(tmp_path / "a.dcm", VALUES, compressed, **fields)
    hounsfield = VALUES.astype(float) - 1024
    np.testing.assert_array_equal(dicom.read(path), shown(hounsfield, 40, 400))
    own = dicom.read(path, dicom.Window(-600, 1500))
    np.testing.assert_array_equal(own, shown(hounsfield, -600, 1500))
    assert own.dtype == np.uint8 and 0 < own[1, 0] < 255


def test_a_window_may_be_given_where_the_file_has_none(tmp_path):
    path = dicom_file(tmp_path / "a.dcm", VALUES.astype(np.int16) - 1024)
    window = dicom.Window(40, 400)
    np.testing.assert_array_equal(dicom.read(path, window), shown(VALUES - 1024.0, 40, 400))


def test_a_sigmoid_window(tmp_path):
    fields = {"WindowCenter": 1000, "WindowWidth": 500, "VOILUTFunction": "SIGMOID"}
    found = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES, **fields))
    expected = 255 / (1 + np.exp(-4 * (VALUES.astype(float) - 1000) / 500))
    np.testing.assert_array_equal(found, np.rint(expected))


def test_the_lowest_value_is_white_in_monochrome_1(tmp_path):
    fields = {"WindowCenter": 1000, "WindowWidth": 2000}
    dark = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES, **fields))
    fields["PhotometricInterpretation"] = "MONOCHROME1"
    white = dicom.read(dicom_file(tmp_path / "b.dcm", VALUES, **fields))
    np.testing.assert_allclose(white, 255.0 - dark, atol=1)
    assert white[0, 0] == 255


def test_a_table_in_the_place_of_a_window(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [4, 100, 8]  # entries, the first value, bits
    table.LUTData = np.array([0, 10, 50, 100], np.uint16).tobytes()
    pixels = np.array([[0, 100, 101], [102, 103, 900]], np.uint16)
    found = dicom.read(dicom_file(tmp_path / "a.dcm", pixels, VOILUTSequence=[table]))
    np.testing.assert_array_equal(found, [[0, 0, 26], [128, 255, 255]])


def test_without_a_window_the_whole_range_is_shown_and_padding_is_not_in_it(tmp_path):
    found = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES))
    np.testing.assert_array_equal(found, np.rint(VALUES.astype(float) / 4095 * 255))
    padded = dicom.read(dicom_file(tmp_path / "b.dcm", VALUES, PixelPaddingValue=0))
    expected = (VALUES.astype(float) - 100) / (4095 - 100) * 255
    np.testing.assert_array_equal(padded, np.rint(expected.clip(0)))
    flat = dicom.read(dicom_file(tmp_path / "c.dcm", np.full((2, 2), 7, np.uint16)))
    assert not flat.any()


def test_eight_bits_stay_as_they_are(tmp_path):
    grey = np.random.default_rng(0).integers(3, 200, (6, 4)).astype(np.uint8)
    np.testing.assert_array_equal(dicom.read(dicom_file(tmp_path / "a.dcm", grey)), grey)
    colour = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)
    np.testing.assert_array_equal(dicom.read(dicom_file(tmp_path / "b.dcm", colour)), colour)


def test_files_are_known_by_what_is_in_them(tmp_path):
    path = dicom_file(tmp_path / "1.2.840.10008.57", VALUES)
    assert dicom.is_dicom(path)
    assert image_io.read_image(path).shape == (2, 3, 1)
    (tmp_path / "b.dcm").write_bytes(b"DICM" + bytes(200))
    assert not dicom.is_dicom(tmp_path / "b.dcm")
    assert not dicom.is_dicom(tmp_path / "nothing") and not dicom.is_dicom(tmp_path)


# One picture, packed in several ways.
@pytest.mark.parametrize("name", ["RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian"])
def test_other_transfer_syntaxes_give_the_same_pixels(name):
    expected = dicom.read(EXAMPLES / "MR_small.dcm")
    assert expected.shape == (64, 64) and expected.std() > 20
    np.testing.assert_array_equal(dicom.read(EXAMPLES / f"MR_small_{name}.dcm"), expected)


@pytest.mark.parametrize(
    ("name", "shape"), [("examples_palette", (350, 800, 3)), ("examples_jpeg2k", (480, 640, 3))]
)
def test_colours(name, shape):
    found = dicom.read(EXAMPLES / f"{name}.dcm")
    assert found.shape == shape and found.dtype == np.uint8 and found.max() > 250


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rtdose", "15 frames; expected one picture; export each as a file"),
        ("reportsi", r"a DICOM file without pixels \(Basic Text SR Storage\)"),
        ("MR_truncated", "cannot be decoded"),
        ("badVR", "cannot be decoded"),
    ],
)
def test_what_holds_no_picture_is_named(name, said):
    with pytest.raises(BadImageError, match=rf"{name}\.dcm: found (a DICOM file that )?{said}"):
        dicom.read(EXAMPLES / f"{name}.dcm")


def test_the_mend_of_a_compression_that_nothing_here_reads(monkeypatch):
    monkeypatch.setattr(dicom, "PLUGINS", ())
    with pytest.raises(BadImageError, match=r"compressed as JPEG Lossless.*pylibjpeg-libjpeg"):
        dicom.read(EXAMPLES / "SC_rgb_jpeg_gdcm.dcm")


@pytest.mark.parametrize("name", ["MR_small_RLE", "MR_small_jp2klossless", "SC_rgb_jpeg_dcmtk"])
def test_damaged_compression_never_raises_anything_else(tmp_path, name):
    rng, whole = np.random.default_rng(0), (EXAMPLES / f"{name}.dcm").read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(132, len(data), 3):
            data[place] = rng.integers(256)
        (tmp_path / "a.dcm").write_bytes(data)
        with contextlib.suppress(BadImageError):
            assert dicom.read(tmp_path / "a.dcm").dtype == np.uint8


def test_an_over_sized_header_is_refused_before_decoding(tmp_path):
    path = dicom_file(tmp_path / "a.dcm", VALUES, Rows=60000, Columns=60000)
    with pytest.raises(BadImageError, match="found 60000 x 60000 pixels"):
        dicom.read(path)


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    whole = dicom_file(
        tmp_path / "a.dcm", VALUES, **CT, WindowCenter=40, WindowWidth=400
    ).read_bytes()
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(132, len(data), 3):
            data[place] = rng.integers(256)
        (tmp_path / "b.dcm").write_bytes(data[: rng.integers(133, len(data) + 1)])
        try:
            found = dicom.read(tmp_path / "b.dcm")
        except BadImageError:
            continue
        assert found.dtype == np.uint8
