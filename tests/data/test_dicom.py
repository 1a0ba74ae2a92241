"""DICOM images: values from the standard's formulas, and pydicom's example files."""

import contextlib
import sys
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


def windowed(values, center, width):
    """PS3.3, C.11.2.1.2.1: values after a LINEAR window."""
    brightness = ((np.asarray(values, float) - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1)
    return np.rint(255 * brightness).astype(np.uint8)


@pytest.mark.parametrize("compressed", [False, True])
def test_window_applies_to_rescaled_values(tmp_path, compressed):
    fields = {**CT, "WindowCenter": [40, 500], "WindowWidth": [400, 1500]}
    path = dicom_file(tmp_path / "a.dcm", VALUES, compressed, **fields)
    hounsfield = VALUES.astype(float) - 1024
    np.testing.assert_array_equal(dicom.read(path), windowed(hounsfield, 40, 400))
    overridden = dicom.read(path, dicom.Window(-600, 1500))
    np.testing.assert_array_equal(overridden, windowed(hounsfield, -600, 1500))
    assert overridden.dtype == np.uint8 and 0 < overridden[1, 0] < 255


def test_missing_pydicom_is_a_bad_image_error_that_names_the_extra(tmp_path, monkeypatch):
    path = dicom_file(tmp_path / "a.dcm", np.full((4, 4), 7, np.uint8))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(BadImageError, match=r"a\.dcm: found a DICOM file.*biclip_jax\[medical\]"):
        image_io.read_image(path)


def test_window_argument_is_used_if_the_file_has_none(tmp_path):
    path = dicom_file(tmp_path / "a.dcm", VALUES.astype(np.int16) - 1024)
    window = dicom.Window(40, 400)
    np.testing.assert_array_equal(dicom.read(path, window), windowed(VALUES - 1024.0, 40, 400))


def test_sigmoid_window(tmp_path):
    fields = {"WindowCenter": 1000, "WindowWidth": 500, "VOILUTFunction": "SIGMOID"}
    image = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES, **fields))
    expected = 255 / (1 + np.exp(-4 * (VALUES.astype(float) - 1000) / 500))
    np.testing.assert_array_equal(image, np.rint(expected))


def test_lowest_value_is_white_in_monochrome_1(tmp_path):
    fields = {"WindowCenter": 1000, "WindowWidth": 2000}
    dark = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES, **fields))
    fields["PhotometricInterpretation"] = "MONOCHROME1"
    white = dicom.read(dicom_file(tmp_path / "b.dcm", VALUES, **fields))
    np.testing.assert_allclose(white, 255.0 - dark, atol=1)
    assert white[0, 0] == 255


def test_lookup_table_instead_of_a_window(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [4, 100, 8]  # entries, the first value, bits
    table.LUTData = np.array([0, 10, 50, 100], np.uint16).tobytes()
    pixels = np.array([[0, 100, 101], [102, 103, 900]], np.uint16)
    image = dicom.read(dicom_file(tmp_path / "a.dcm", pixels, VOILUTSequence=[table]))
    np.testing.assert_array_equal(image, [[0, 0, 10], [50, 100, 100]])


def test_lookup_table_with_more_entries_than_its_bits(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 8]
    table.LUTData = (np.arange(4096) // 16).astype(np.uint16).tobytes()
    image = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES, VOILUTSequence=[table]))
    np.testing.assert_array_equal(image, VALUES // 16)
    table.LUTData = (np.arange(4096) // 16).astype(np.uint8).tobytes()  # two entries per word
    packed = dicom.read(dicom_file(tmp_path / "b.dcm", VALUES, VOILUTSequence=[table]))
    np.testing.assert_array_equal(packed, image)


def test_modality_table_applies_before_the_window(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [3, 0, 16], "US"
    table.LUTData = np.array([0, 1000, 5000], np.uint16).tobytes()
    pixels = np.array([[0, 1, 2]], np.uint8)
    fields = {"ModalityLUTSequence": [table], "WindowCenter": 1000.5, "WindowWidth": 4001}
    image = dicom.read(dicom_file(tmp_path / "a.dcm", pixels, **fields))
    np.testing.assert_array_equal(image, windowed([[0, 1000, 5000]], 1000.5, 4001))


def test_signed_values_of_fewer_bits_and_a_negative_slope(tmp_path):
    pixels = np.array([[-2000, 0, 2000]], np.int16)
    fields = {"BitsStored": 12, "HighBit": 11, "RescaleSlope": -1, "RescaleIntercept": 0}
    path = dicom_file(tmp_path / "a.dcm", pixels, **fields)
    np.testing.assert_array_equal(dicom.read(path), [[255, 128, 0]])
    image = dicom.read(path, dicom.Window(0, 4001))
    np.testing.assert_array_equal(image, windowed([[2000, 0, -2000]], 0, 4001))


def test_enhanced_file_has_rescale_and_window_in_functional_groups(tmp_path):
    rescale, voi, shared, frame = Dataset(), Dataset(), Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -1024, "HU"
    voi.WindowCenter, voi.WindowWidth = 40, 400
    shared.PixelValueTransformationSequence, frame.FrameVOILUTSequence = [rescale], [voi]
    fields = {
        "NumberOfFrames": 1,
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": [frame],
    }
    image = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES, **fields))
    np.testing.assert_array_equal(image, windowed(VALUES - 1024.0, 40, 400))


@pytest.mark.parametrize(
    "fields",
    [
        {"WindowCenter": 500, "WindowWidth": 0},
        {"WindowCenter": None, "WindowWidth": 400},
        {"WindowCenter": 500, "WindowWidth": 0.5, "VOILUTFunction": None},
    ],
)
def test_invalid_window_is_ignored(tmp_path, fields):
    image = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES, **fields))
    np.testing.assert_array_equal(image, dicom.read(dicom_file(tmp_path / "b.dcm", VALUES)))


def test_palettes(tmp_path):
    colours = np.array([[0, 0, 0], [255, 0, 10], [20, 200, 30], [1, 2, 3]], np.uint16)
    fields = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, column in zip(("Red", "Green", "Blue"), colours.T, strict=True):
        fields[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, 8]
        fields[f"{name}PaletteColorLookupTableData"] = column.tobytes()
    pixels = np.array([[0, 1], [2, 9]], np.uint8)
    image = dicom.read(dicom_file(tmp_path / "a.dcm", pixels, **fields))
    np.testing.assert_array_equal(image, colours[[[0, 1], [2, 3]]])


def test_without_a_window_the_full_range_except_padding_is_displayed(tmp_path):
    image = dicom.read(dicom_file(tmp_path / "a.dcm", VALUES))
    np.testing.assert_array_equal(image, np.rint(VALUES.astype(float) / 4095 * 255))
    for padding in (
        {"PixelPaddingValue": 0},
        {"PixelPaddingValue": 50, "PixelPaddingRangeLimit": 0},
    ):
        padded = dicom.read(dicom_file(tmp_path / "b.dcm", VALUES, **padding))
        expected = (VALUES.astype(float) - 100) / (4095 - 100) * 255
        np.testing.assert_array_equal(padded, np.rint(expected.clip(0)))
    above = {"PixelPaddingValue": 4095, "PhotometricInterpretation": "MONOCHROME1"}
    image = dicom.read(dicom_file(tmp_path / "b.dcm", VALUES, **above))
    assert image[0, 0] == 255 and image[1, 1] == 0 and image[1, 2] == 0
    flat = dicom.read(dicom_file(tmp_path / "c.dcm", np.full((2, 2), 7, np.uint16)))
    assert not flat.any()


def test_eight_bits_stay_unchanged(tmp_path):
    grey = np.random.default_rng(0).integers(3, 200, (6, 4)).astype(np.uint8)
    np.testing.assert_array_equal(dicom.read(dicom_file(tmp_path / "a.dcm", grey)), grey)
    wide = dicom_file(tmp_path / "c.dcm", grey.astype(np.uint16), BitsStored=8, HighBit=7)
    np.testing.assert_array_equal(dicom.read(wide), grey)
    colour = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)
    np.testing.assert_array_equal(dicom.read(dicom_file(tmp_path / "b.dcm", colour)), colour)


def test_files_are_detected_by_content(tmp_path):
    path = dicom_file(tmp_path / "1.2.840.10008.57", VALUES)
    assert dicom.is_dicom(path)
    assert image_io.read_image(path).shape == (2, 3, 1)
    (tmp_path / "b.dcm").write_bytes(b"DICM" + bytes(200))
    assert not dicom.is_dicom(tmp_path / "b.dcm")
    assert not dicom.is_dicom(tmp_path / "nothing") and not dicom.is_dicom(tmp_path)


# The same image with several transfer syntaxes.
@pytest.mark.parametrize("name", ["RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian"])
def test_other_transfer_syntaxes_give_the_same_pixels(name):
    expected = dicom.read(EXAMPLES / "MR_small.dcm")
    assert expected.shape == (64, 64) and expected.std() > 20
    np.testing.assert_array_equal(dicom.read(EXAMPLES / f"MR_small_{name}.dcm"), expected)


# The same colour image; "+cr" and "+cy": lossy JPEG of RGB and of YBR.
@pytest.mark.parametrize(
    ("name", "mean"),
    [("rle_16bit", 0), ("gdcm_KY", 0.2), ("dcmtk_+eb+cr", 0.2), ("dcmtk_+eb+cy+np", 4)],
)
def test_colour_transfer_syntaxes_give_the_same_image(name, mean):
    expected = dicom.read(EXAMPLES / "SC_rgb_rle.dcm").astype(int)
    assert expected.shape == (100, 100, 3)
    assert expected[5, 50].tolist() == [255, 0, 0]  # red, then others, from top to bottom
    image = dicom.read(EXAMPLES / f"SC_rgb_{name}.dcm").astype(int)
    assert np.abs(image - expected).mean() <= mean


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtdose", "15 frames; expected one image; export each as a file"),
        ("reportsi", r"a DICOM file without pixels \(Basic Text SR Storage\)"),
        ("image_dfl", "a deflated DICOM file; .*export it uncompressed"),
        ("MR_truncated", "cannot be decoded"),
        ("badVR", "cannot be decoded"),
    ],
)
def test_error_names_files_without_a_single_image(name, message):
    with pytest.raises(BadImageError, match=rf"{name}\.dcm: found (a DICOM file that )?{message}"):
        dicom.read(EXAMPLES / f"{name}.dcm")


def test_error_for_an_unsupported_compression_names_the_packages(monkeypatch):
    monkeypatch.setattr(dicom, "PLUGINS", ())
    with pytest.raises(BadImageError, match=r"compressed as JPEG Lossless.*pylibjpeg-libjpeg"):
        dicom.read(EXAMPLES / "SC_rgb_jpeg_gdcm.dcm")


def test_rejects_more_pixels_than_in_the_header(tmp_path):
    path = dicom_file(tmp_path / "a.dcm", VALUES, PixelData=bytes(2 * VALUES.nbytes))
    with pytest.raises(BadImageError, match="more pixels than one frame has"):
        dicom.read(path)


def test_errors_do_not_quote_the_file(tmp_path, caplog, recwarn):
    """A damaged length makes a UID include the patient's name."""
    intact = dicom_file(tmp_path / "a.dcm", VALUES).read_bytes()
    rng, messages = np.random.default_rng(0), []
    for _ in range(400):
        data = bytearray(intact)
        for position in rng.integers(132, len(data), 3):
            data[position] = rng.integers(256)
        (tmp_path / "a.dcm").write_bytes(data)
        try:
            dicom.read(tmp_path / "a.dcm")
        except BadImageError as error:
            messages.append(str(error))
    assert len(messages) > 100
    messages += [record.getMessage() for record in caplog.records]
    messages += [str(warning.message) for warning in recwarn]
    assert not [line for line in messages if "Patient" in line]


@pytest.mark.parametrize("name", ["MR_small_RLE", "MR_small_jp2klossless", "SC_rgb_jpeg_dcmtk"])
def test_damaged_compression_raises_only_bad_image_errors(tmp_path, name):
    rng, intact = np.random.default_rng(0), (EXAMPLES / f"{name}.dcm").read_bytes()
    for _ in range(60):
        data = bytearray(intact)
        for position in rng.integers(132, len(data), 3):
            data[position] = rng.integers(256)
        (tmp_path / "a.dcm").write_bytes(data)
        with contextlib.suppress(BadImageError):
            assert dicom.read(tmp_path / "a.dcm").dtype == np.uint8


def test_rejects_oversized_header_before_decoding(tmp_path):
    path = dicom_file(tmp_path / "a.dcm", VALUES, Rows=60000, Columns=60000)
    with pytest.raises(BadImageError, match="found 60000 x 60000 pixels"):
        dicom.read(path)


def test_damaged_bytes_raise_only_bad_image_errors(tmp_path):
    rng = np.random.default_rng(0)
    intact = dicom_file(
        tmp_path / "a.dcm", VALUES, **CT, WindowCenter=40, WindowWidth=400
    ).read_bytes()
    for _ in range(200):
        data = bytearray(intact)
        for position in rng.integers(132, len(data), 3):
            data[position] = rng.integers(256)
        (tmp_path / "b.dcm").write_bytes(data[: rng.integers(133, len(data) + 1)])
        try:
            image = dicom.read(tmp_path / "b.dcm")
        except BadImageError:
            continue
        assert image.dtype == np.uint8
