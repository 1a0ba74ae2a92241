"""DICOM files as 8-bit pictures: what a viewer shows of them (PS3.3, C.7.6.3 and C.11).

Pixels are taken as they lie in the file; nothing else of it, such as names, goes anywhere, not even
into a message.
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

MAX_PIXELS = 32 * 2**20  # a mammogram has 20; values are floats of 64 bits on their way
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("Red", "Green", "Blue")
# pydicom's decoders that bear damaged files; gdcm ends the process.
PLUGINS = ("pydicom", "pillow", "pyjpegls", "pylibjpeg")


class Window(NamedTuple):
    """The grey values that are shown: of width `width` around `center`; CT: in Hounsfield units."""

    center: float
    width: float


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as DICOM files do, whatever its name."""
    try:
        if not os.path.isfile(path):  # a pipe would wait for ever
            return False
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read(path: str | os.PathLike[str], window: Window | None = None) -> np.ndarray:
    """Reads one picture by the file's modality and window transformations, black lowest.

    Without a window or a table in the file, values of up to 8 bits are as they are, and others go
    from the darkest pixel to the brightest. Padding is black.

    Args:
      path: a file for which `is_dicom`, of one frame.
      window: instead of the file's first one.

    Returns:
      (H, W) uint8 grey, or (H, W, 3) uint8 RGB.

    Raises:
      BadImageError: damaged, without a picture or with several, too large, or compressed in a way
        that cannot be read here.
    """
    import pydicom

    try:
        with _silence():
            _check_syntax(path, pydicom.filereader.read_file_meta_info(path))
            dataset = pydicom.dcmread(path)
            _check(path, dataset)
            _lift_groups(dataset)
            stored = _decode(path, dataset)
            if dataset.PhotometricInterpretation in GREY:
                share = _grey(stored, dataset, window)
            else:
                share = _colour(stored, dataset)
    except BadImageError:
        raise
    except Exception as error:  # a foreign file: its decoders raise anything
        # Without the error's own words, which may quote the file.
        found = f"a DICOM file that cannot be decoded ({type(error).__name__})"
        fix = "copy the file again, or export it as PNG"
        raise bad_image(path, found, "one whole picture", fix) from error
    return np.rint(255 * share.clip(0, 1)).astype(np.uint8)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps pydicom's warnings away, which quote the file."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _check_syntax(path: str | os.PathLike[str], meta: Dataset) -> None:
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

    syntax = UID(meta.TransferSyntaxUID)
    if syntax == DeflatedExplicitVRLittleEndian:
        found, fix = (
            "a deflated DICOM file",
            "export it uncompressed: this one may grow a thousandfold",
        )
        raise bad_image(path, found, "another transfer syntax", fix)
    if syntax.is_compressed and not set(PLUGINS) & set(get_decoder(syntax).available_plugins):
        fix = (
            "for JPEG-LS pip install 'biclip_jax[medical]', for lossless JPEG pip install "
            "pylibjpeg pylibjpeg-libjpeg, or export it as PNG"
        )
        raise bad_image(path, f"pixels compressed as {syntax.name}", "a decoder for them", fix)


def _check(path: str | os.PathLike[str], dataset: Dataset) -> None:
    from pydicom.uid import UID_dictionary

    if not dataset.get("PixelData"):
        # A damaged UID may hold what follows it in the file.
        name, *_ = UID_dictionary.get(dataset.get("SOPClassUID", ""), ("unknown kind",))
        raise bad_image(path, f"a DICOM file without pixels ({name})", "a picture", "leave it out")
    height, width = dataset.Rows, dataset.Columns
    if not 0 < height * width <= MAX_PIXELS:
        fix = "scale the picture down"
        raise bad_image(path, f"{width} x {height} pixels", f"1 to {MAX_PIXELS} pixels", fix)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise bad_image(path, f"{frames} frames", "one picture", "export each as a file")


def _lift_groups(dataset: Dataset) -> None:
    """Rescale and window of an enhanced file's only frame, to where other files have them."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in dataset.get(groups) or []:
            for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in group.get(name) or []:
                    for element in item:
                        dataset.add(element)


def _decode(path: str | os.PathLike[str], dataset: Dataset) -> np.ndarray:
    """Stored values: (H, W) grey or indices, (H, W, 3) RGB."""
    from pydicom.pixels import get_decoder

    syntax, plugins = dataset.file_meta.TransferSyntaxUID, [""]
    size = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated // 8
    if syntax.is_compressed:
        there = get_decoder(syntax).available_plugins
        plugins = [name for name in PLUGINS if name in there]
    elif len(dataset.PixelData) > size + size % 2:
        fix = "export each as a file"
        raise bad_image(path, "more pixels than one frame has", "one picture", fix)
    stored = _by_first_that_can(dataset, plugins)
    channels = (3,) if dataset.PhotometricInterpretation not in (*GREY, "PALETTE COLOR") else ()
    expected = (dataset.Rows, dataset.Columns, *channels)
    if stored.shape != expected:
        fix = "export it as PNG"
        raise bad_image(path, f"pixels of shape {stored.shape}", f"{expected}", fix)
    return stored


def _by_first_that_can(dataset: Dataset, plugins: list[str]) -> np.ndarray:
    from pydicom.pixels import pixel_array

    for plugin in plugins[:-1]:
        with contextlib.suppress(Exception):  # pillow, for one, reads no JPEG of 12 bits
            return pixel_array(dataset, decoding_plugin=plugin)
    return pixel_array(dataset, decoding_plugin=plugins[-1])


def _grey(stored: np.ndarray, dataset: Dataset, window: Window | None) -> np.ndarray:
    padding = _padding(stored, dataset)
    values = _modality(stored, dataset)
    window, function = (window, "LINEAR") if window else _own_window(dataset)
    if window:
        share = _through(window, function, values)
    elif tables := dataset.get("VOILUTSequence"):
        share = _looked_up(tables[0].LUTDescriptor, tables[0].LUTData, np.rint(values), dataset)
    elif dataset.BitsStored <= 8 and np.array_equal(values, stored) and values.min() >= 0:
        share = values / (2**dataset.BitsStored - 1)
    else:
        seen = values[~padding]
        darkest, brightest = (seen.min(), seen.max()) if seen.size else (0.0, 1.0)
        share = (values - darkest) / max(brightest - darkest, 1e-9)
    share = share.clip(0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    return np.where(padding, 0.0, share)


def _padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Where a pixel only fills the picture (C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    low, high = sorted((value, dataset.get("PixelPaddingRangeLimit", value)))
    return (stored >= low) & (stored <= high)


def _modality(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Float values such as Hounsfield units (C.11.1)."""
    if tables := dataset.get("ModalityLUTSequence"):
        descriptor = tables[0].LUTDescriptor
        share = _looked_up(descriptor, tables[0].LUTData, stored, dataset)
        return share * (2 ** descriptor[2] - 1)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    values = stored.astype(np.float64)
    return values if slope is None else values * float(slope) + float(intercept or 0)


def _own_window(dataset: Dataset) -> tuple[Window | None, str]:
    """The file's first window and its function; None where it has none that can be used."""
    centers, widths = (np.ravel(dataset.get(n)) for n in ("WindowCenter", "WindowWidth"))
    function = (dataset.get("VOILUTFunction") or "LINEAR").upper()
    if centers[0] is None or widths[0] is None:
        return None, function
    window = Window(float(centers[0]), float(widths[0]))
    usable = window.width >= 1 if function == "LINEAR" else window.width > 0
    return (window if usable else None), function


def _through(window: Window, function: str, values: np.ndarray) -> np.ndarray:
    """Shares of white (C.11.2.1.2 and C.11.2.1.3), to be clipped to [0, 1]."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp((-4 * (values - window.center) / window.width).clip(-500, 500)))
    if function == "LINEAR_EXACT":
        return (values - window.center) / window.width + 0.5
    return (values - (window.center - 0.5)) / max(window.width - 1, 1e-9) + 0.5


def _looked_up(descriptor, data, values: np.ndarray, dataset: Dataset) -> np.ndarray:
    """A table's entries for values, as shares of what its bits can hold (C.11.1.1, C.7.6.3.1.5)."""
    length, first, bits = descriptor
    length = length or 2**16
    if isinstance(data, bytes):
        order = "<" if dataset.original_encoding[1] else ">"
        # Entries of 8 bits may lie one or two in 16.
        data = np.frombuffer(data, f"{order}u2" if len(data) >= 2 * length else np.uint8)
    table = np.asarray(data, np.float64)[:length]
    index = (values.astype(np.int64) - first).clip(0, len(table) - 1)
    return table[index] / (2**bits - 1)


def _colour(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    if dataset.PhotometricInterpretation != "PALETTE COLOR":
        return stored / (2.0**dataset.BitsStored - 1)
    name = "{}PaletteColorLookupTable{}"
    return np.stack(
        [
            _looked_up(
                dataset[name.format(colour, "Descriptor")].value,
                dataset[name.format(colour, "Data")].value,
                stored,
                dataset,
            )
            for colour in COLOURS
        ],
        axis=-1,
    )
