"""Reads DICOM files as 8-bit images, as a viewer displays them (PS3.3, C.7.6.3 and C.11).

Only pixels leave this module. Nothing else in a file, such as names, is passed on or appears in a
message.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from biclip_jax.core.errors import BadImageError, bad_image

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_PIXELS = 32 * 2**20  # a mammogram has 20 * 2**20; intermediate values are float64
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("Red", "Green", "Blue")
# pydicom's decoders that tolerate damaged files; gdcm terminates the process.
PLUGINS = ("pydicom", "pillow", "pyjpegls", "pylibjpeg")


class Window(NamedTuple):
    """The displayed intensity range: `width` around `center`; for CT in Hounsfield units."""

    center: float
    width: float


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file starts with the DICOM preamble, whatever its name."""
    try:
        if not os.path.isfile(path):  # reading a pipe would block forever
            return False
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read(path: str | os.PathLike[str], window: Window | None = None) -> np.ndarray:
    """Reads one image with the file's modality and window transforms; the lowest value is black.

    Without a window or a table in the file, values of up to 8 bits stay unchanged and others are
    scaled to the range from the darkest to the brightest pixel. Padding is black.

    Args:
      path: File for which `is_dicom` is true, with one frame.
      window: Window to use instead of the first one in the file.

    Returns:
      (H, W) uint8 greyscale, or (H, W, 3) uint8 RGB.

    Raises:
      BadImageError: The file is damaged, has no image or several, is too large, or is compressed
        in a way that the installed decoders do not support.
    """
    try:
        import pydicom
    except ModuleNotFoundError as error:
        fix = "pip install 'biclip_jax[medical]', or export it as PNG"
        raise bad_image(path, "a DICOM file", "pydicom to read it", fix) from error
    try:
        with _suppress_warnings():
            _check_syntax(path, pydicom.filereader.read_file_meta_info(path))
            dataset = pydicom.dcmread(path)
            _check_header(path, dataset)
            _flatten_functional_groups(dataset)
            stored = _decode(path, dataset)
            if dataset.PhotometricInterpretation in GREY:
                brightness = _render_grey(stored, dataset, window)
            else:
                brightness = _render_colour(stored, dataset)
    except BadImageError:
        raise
    except Exception as error:  # the decoders may raise anything on an untrusted file
        # The error's own message is left out: it may quote the file.
        found = f"a DICOM file that cannot be decoded ({type(error).__name__})"
        fix = "copy the file again, or export it as PNG"
        raise bad_image(path, found, "one complete image", fix) from error
    return np.rint(255 * brightness.clip(0, 1)).astype(np.uint8)


@contextlib.contextmanager
def _suppress_warnings() -> Iterator[None]:
    """Suppresses pydicom's warnings, which quote the file."""
    logger = logging.getLogger("pydicom")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def _check_syntax(path: str | os.PathLike[str], meta: Dataset) -> None:
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

    syntax = UID(meta.TransferSyntaxUID)
    if syntax == DeflatedExplicitVRLittleEndian:
        found, fix = (
            "a deflated DICOM file",
            "export it uncompressed: this one may expand a thousandfold",
        )
        raise bad_image(path, found, "another transfer syntax", fix)
    if syntax.is_compressed and not set(PLUGINS) & set(get_decoder(syntax).available_plugins):
        fix = (
            "for JPEG-LS pip install 'biclip_jax[medical]', for lossless JPEG pip install "
            "pylibjpeg pylibjpeg-libjpeg, or export it as PNG"
        )
        raise bad_image(path, f"pixels compressed as {syntax.name}", "a decoder for them", fix)


def _check_header(path: str | os.PathLike[str], dataset: Dataset) -> None:
    from pydicom.uid import UID_dictionary

    if not dataset.get("PixelData"):
        # A damaged UID may contain the data that follows it; only known UIDs are shown.
        name, *_ = UID_dictionary.get(dataset.get("SOPClassUID", ""), ("unknown kind",))
        raise bad_image(path, f"a DICOM file without pixels ({name})", "an image", "leave it out")
    height, width = dataset.Rows, dataset.Columns
    if not 0 < height * width <= MAX_PIXELS:
        fix = "downscale the image"
        raise bad_image(path, f"{width} x {height} pixels", f"1 to {MAX_PIXELS} pixels", fix)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise bad_image(path, f"{frames} frames", "one image", "export each as a file")


def _flatten_functional_groups(dataset: Dataset) -> None:
    """Moves rescale and window of an enhanced file's single frame to the top level."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in dataset.get(groups) or []:
            for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in group.get(name) or []:
                    for element in item:
                        dataset.add(element)


def _decode(path: str | os.PathLike[str], dataset: Dataset) -> np.ndarray:
    """Returns the stored values: (H, W) greyscale or palette indices, or (H, W, 3) RGB."""
    from pydicom.pixels import get_decoder

    syntax, plugins = dataset.file_meta.TransferSyntaxUID, [""]
    size = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated // 8
    if syntax.is_compressed:
        available = get_decoder(syntax).available_plugins
        plugins = [name for name in PLUGINS if name in available]
    elif len(dataset.PixelData) > size + size % 2:
        fix = "export each as a file"
        raise bad_image(path, "more pixels than one frame has", "one image", fix)
    stored = _decode_by_first_working_plugin(dataset, plugins)
    channels = (3,) if dataset.PhotometricInterpretation not in (*GREY, "PALETTE COLOR") else ()
    expected = (dataset.Rows, dataset.Columns, *channels)
    if stored.shape != expected:
        fix = "export it as PNG"
        raise bad_image(path, f"pixels of shape {stored.shape}", f"{expected}", fix)
    return stored


def _decode_by_first_working_plugin(dataset: Dataset, plugins: list[str]) -> np.ndarray:
    from pydicom.pixels import pixel_array

    for plugin in plugins[:-1]:
        with contextlib.suppress(Exception):  # pillow, for example, cannot read 12-bit JPEG
            return pixel_array(dataset, decoding_plugin=plugin)
    return pixel_array(dataset, decoding_plugin=plugins[-1])


def _render_grey(stored: np.ndarray, dataset: Dataset, window: Window | None) -> np.ndarray:
    padding = _padding_mask(stored, dataset)
    values = _apply_modality(stored, dataset)
    window, function = (window, "LINEAR") if window else _file_window(dataset)
    if window:
        brightness = _apply_window(window, function, values)
    elif tables := dataset.get("VOILUTSequence"):
        brightness = _apply_lut(
            tables[0].LUTDescriptor, tables[0].LUTData, np.rint(values), dataset
        )
    elif dataset.BitsStored <= 8 and np.array_equal(values, stored) and values.min() >= 0:
        brightness = values / (2**dataset.BitsStored - 1)
    else:
        visible = values[~padding]
        darkest, brightest = (visible.min(), visible.max()) if visible.size else (0.0, 1.0)
        brightness = (values - darkest) / max(brightest - darkest, 1e-9)
    brightness = brightness.clip(0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        brightness = 1 - brightness
    return np.where(padding, 0.0, brightness)


def _padding_mask(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Returns a mask of the padding pixels (C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    low, high = sorted((value, dataset.get("PixelPaddingRangeLimit", value)))
    return (stored >= low) & (stored <= high)


def _apply_modality(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Converts stored values to physical ones (float), such as Hounsfield units (C.11.1)."""
    if tables := dataset.get("ModalityLUTSequence"):
        descriptor = tables[0].LUTDescriptor
        fraction = _apply_lut(descriptor, tables[0].LUTData, stored, dataset)
        return fraction * (2 ** descriptor[2] - 1)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    values = stored.astype(np.float64)
    return values if slope is None else values * float(slope) + float(intercept or 0)


def _file_window(dataset: Dataset) -> tuple[Window | None, str]:
    """Returns the file's first window, or None if it has no valid one, and its function."""
    centers, widths = (np.ravel(dataset.get(n)) for n in ("WindowCenter", "WindowWidth"))
    function = (dataset.get("VOILUTFunction") or "LINEAR").upper()
    if centers[0] is None or widths[0] is None:
        return None, function
    window = Window(float(centers[0]), float(widths[0]))
    usable = window.width >= 1 if function == "LINEAR" else window.width > 0
    return (window if usable else None), function


def _apply_window(window: Window, function: str, values: np.ndarray) -> np.ndarray:
    """Maps values to brightness, 0 black to 1 white, unclipped (C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp((-4 * (values - window.center) / window.width).clip(-500, 500)))
    if function == "LINEAR_EXACT":
        return (values - window.center) / window.width + 0.5
    return (values - (window.center - 0.5)) / max(window.width - 1, 1e-9) + 0.5


def _apply_lut(descriptor, data, values: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Looks values up in a table, scaled to [0, 1] by its bits (C.11.1.1, C.7.6.3.1.5)."""
    length, first, bits = descriptor
    length = length or 2**16
    if isinstance(data, bytes):
        order = "<" if dataset.original_encoding[1] else ">"
        # 8-bit entries are stored one or two per 16-bit word.
        data = np.frombuffer(data, f"{order}u2" if len(data) >= 2 * length else np.uint8)
    table = np.asarray(data, np.float64)[:length]
    index = (values.astype(np.int64) - first).clip(0, len(table) - 1)
    return table[index] / (2**bits - 1)


def _render_colour(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    if dataset.PhotometricInterpretation != "PALETTE COLOR":
        return stored / (2.0**dataset.BitsStored - 1)
    name = "{}PaletteColorLookupTable{}"
    return np.stack(
        [
            _apply_lut(
                dataset[name.format(colour, "Descriptor")].value,
                dataset[name.format(colour, "Data")].value,
                stored,
                dataset,
            )
            for colour in COLOURS
        ],
        axis=-1,
    )
