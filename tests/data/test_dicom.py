"""DICOM pictures: values worked out by the standard's formulas, and pydicom's own example files."""

import contextlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from biclip_jax.core.errors import BadImageError
from biclip_jax.data import dicom, image_io

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
    np.testing.assert_array_equal(found, [[0, 0, 10], [50, 100, 100]])


def test_a_table_is_longer_than_its_entries_are_wide(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 8]
    table.LUTData = (np.arange(4096) // 16).astype(np.uint16).tobytes()
    found = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES, VOILUTSequence=[table]))
    np.testing.assert_array_equal(found, VALUES // 16)
    table.LUTData = (np.arange(4096) // 16).astype(np.uint8).tobytes()  # two entries a word
    packed = dicom.read(dicom_file(tmp_path / "b.dcm", VALUES, VOILUTSequence=[table]))
    np.testing.assert_array_equal(packed, found)


def test_a_modality_table_comes_before_the_window(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [3, 0, 16], "US"
    table.LUTData = np.array([0, 1000, 5000], np.uint16).tobytes()
    pixels = np.array([[0, 1, 2]], np.uint8)
    fields = {"ModalityLUTSequence": [table], "WindowCenter": 1000.5, "WindowWidth": 4001}
    found = dicom.read(dicom_file(tmp_path / "a.dcm", pixels, **fields))
    np.testing.assert_array_equal(found, shown([[0, 1000, 5000]], 1000.5, 4001))


def test_signed_values_of_fewer_bits_and_a_falling_slope(tmp_path):
    pixels = np.array([[-2000, 0, 2000]], np.int16)
    fields = {"BitsStored": 12, "HighBit": 11, "RescaleSlope": -1, "RescaleIntercept": 0}
    path = dicom_file(tmp_path / "a.dcm", pixels, **fields)
    np.testing.assert_array_equal(dicom.read(path), [[255, 128, 0]])
    windowed = dicom.read(path, dicom.Window(0, 4001))
    np.testing.assert_array_equal(windowed, shown([[2000, 0, -2000]], 0, 4001))


def test_an_enhanced_file_keeps_rescale_and_window_in_its_groups(tmp_path):
    rescale, voi, shared, frame = Dataset(), Dataset(), Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -1024, "HU"
    voi.WindowCenter, voi.WindowWidth = 40, 400
    shared.PixelValueTransformationSequence, frame.FrameVOILUTSequence = [rescale], [voi]
    fields = {
        "NumberOfFrames": 1,
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": [frame],
    }
    found = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES, **fields))
    np.testing.assert_array_equal(found, shown(VALUES - 1024.0, 40, 400))


@pytest.mark.parametrize(
    "fields",
    [
        {"WindowCenter": 500, "WindowWidth": 0},
        {"WindowCenter": None, "WindowWidth": 400},
        {"WindowCenter": 500, "WindowWidth": 0.5, "VOILUTFunction": None},
    ],
)
def test_a_window_that_cannot_be_used_counts_as_none(tmp_path, fields):
    found = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES, **fields))
    np.testing.assert_array_equal(found, dicom.read(dicom_file(tmp_path / "b.dcm", VALUES)))


def test_palettes(tmp_path):
    colours = np.array([[0, 0, 0], [255, 0, 10], [20, 200, 30], [1, 2, 3]], np.uint16)
    fields = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, column in zip(("Red", "Green", "Blue"), colours.T, strict=True):
        fields[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, 8]
        fields[f"{name}PaletteColorLookupTableData"] = column.tobytes()
    pixels = np.array([[0, 1], [2, 9]], np.uint8)
    found = dicom.read(dicom_file(tmp_path / "a.dcm", pixels, **fields))
    np.testing.assert_array_equal(found, colours[[[0, 1], [2, 3]]])


def test_without_a_window_the_whole_range_is_shown_and_padding_is_not_in_it(tmp_path):
    found = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES))
    np.testing.assert_array_equal(found, np.rint(VALUES.astype(float) / 4095 * 255))
    for padding in (
        {"PixelPaddingValue": 0},
        {"PixelPaddingValue": 50, "PixelPaddingRangeLimit": 0},
    ):
        padded = dicom.read(dicom_file(tmp_path / "b.dcm", VALUES, **padding))
        expected = (VALUES.astype(float) - 100) / (4095 - 100) * 255
        np.testing.assert_array_equal(padded, np.rint(expected.clip(0)))
    above = {"PixelPaddingValue": 4095, "PhotometricInterpretation": "MONOCHROME1"}
    found = dicom.read(dicom_file(tmp_path / "b.dcm", VALUES, **above))
    assert found[0, 0] == 255 and found[1, 1] == 0 and found[1, 2] == 0
    flat = dicom.read(dicom_file(tmp_path / "c.dcm", np.full((2, 2), 7, np.uint16)))
    assert not flat.any()


def test_eight_bits_stay_as_they_are(tmp_path):
    grey = np.random.default_rng(0).integers(3, 200, (6, 4)).astype(np.uint8)
    np.testing.assert_array_equal(dicom.read(dicom_file(tmp_path / "a.dcm", grey)), grey)
    wide = dicom_file(tmp_path / "c.dcm", grey.astype(np.uint16), BitsStored=8, HighBit=7)
    np.testing.assert_array_equal(dicom.read(wide), grey)
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


# One picture in colour, likewise; "+cr" and "+cy": lossy JPEG of RGB and of YBR.
@pytest.mark.parametrize(
    ("name", "mean"),
    [("rle_16bit", 0), ("gdcm_KY", 0.2), ("dcmtk_+eb+cr", 0.2), ("dcmtk_+eb+cy+np", 4)],
)
def test_colours_in_several_packings_are_the_same(name, mean):
    expected = dicom.read(EXAMPLES / "SC_rgb_rle.dcm").astype(int)
    assert expected.shape == (100, 100, 3)
    assert expected[5, 50].tolist() == [255, 0, 0]  # red, then others, from top to bottom
    found = dicom.read(EXAMPLES / f"SC_rgb_{name}.dcm").astype(int)
    assert np.abs(found - expected).mean() <= mean


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rtdose", "15 frames; expected one picture; export each as a file"),
        ("reportsi", r"a DICOM file without pixels \(Basic Text SR Storage\)"),
        ("image_dfl", "a deflated DICOM file; .*export it uncompressed"),
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


def test_more_pixels_than_the_header_says_are_refused(tmp_path):
    path = dicom_file(tmp_path / "a.dcm", VALUES, PixelData=bytes(2 * VALUES.nbytes))
    with pytest.raises(BadImageError, match="more pixels than one frame has"):
        dicom.read(path)


def test_a_message_quotes_nothing_of_the_file(tmp_path, caplog, recwarn):
    """A length that is damaged lets a UID run on into the patient's name."""
    whole = dicom_file(tmp_path / "a.dcm", VALUES).read_bytes()
    rng, said = np.random.default_rng(0), []
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(132, len(data), 3):
            data[place] = rng.integers(256)
        (tmp_path / "a.dcm").write_bytes(data)
        try:
            dicom.read(tmp_path / "a.dcm")
        except BadImageError as error:
            said.append(str(error))
    assert len(said) > 100
    said += [record.getMessage() for record in caplog.records]
    said += [str(warning.message) for warning in recwarn]
    assert not [line for line in said if "Patient" in line]


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
