"""DICOM files as 8-bit pictures: what a viewer shows of them.

Pixels are taken as they lie in the file; nothing else of it, such as names, goes anywhere.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from biclip_jax.errors import BadImageError

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_PIXELS = 32 * 2**20  # a mammogram has 20; values are floats of 64 bits on their way
GREY = ("MONOCHROME1", "MONOCHROME2")
# pydicom's decoders that bear damaged files; gdcm ends the process.
PLUGINS = ("pydicom", "pillow", "pyjpegls", "pylibjpeg")
FAR = 1e12  # beyond every grey value


class Window(NamedTuple):
    """The grey values that are shown: of width `width` around `center`; CT: in Hounsfield units."""

    center: float
    width: float


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as DICOM files do, whatever its name."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read(path: str | os.PathLike[str], window: Window | None = None) -> np.ndarray:
    """Reads one picture by the file's modality and window transformations, black lowest.

    Without a window or a table in the file, 8-bit values are as they are, and others go from the
    darkest pixel to the brightest, padding left out.

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote the file, which may name a patient
            dataset = pydicom.dcmread(path)
            _check(path, dataset)
            stored = pydicom.pixels.pixel_array(dataset, decoding_plugin=_plugin(dataset))
            if dataset.PhotometricInterpretation in GREY:
                return _grey(stored, dataset, window)
            return _colour(stored, dataset)
    except BadImageError:
        raise
    except Exception as error:  # a foreign file: its decoders raise anything
        raise _undecodable(path, error) from error


def _check(path: str | os.PathLike[str], dataset: Dataset) -> None:
    if not dataset.get("PixelData"):
        kind = dataset.file_meta.get("MediaStorageSOPClassUID")
        name = getattr(kind, "name", "unknown kind")
        raise _bad(path, f"a DICOM file without pixels ({name})", "a picture", "leave it out")
    height, width = dataset.Rows, dataset.Columns
    if not 0 < height * width <= MAX_PIXELS:
        mend = "scale the picture down"
        raise _bad(path, f"{width} x {height} pixels", f"1 to {MAX_PIXELS} pixels", mend)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise _bad(path, f"{frames} frames", "one picture", "export each as a file")


def _plugin(dataset: Dataset) -> str:
    """The decoder of compressed pixels, empty for others."""
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        return ""
    there = get_decoder(syntax).available_plugins
    found = next((name for name in PLUGINS if name in there), None)
    if found is None:
        raise NotImplementedError(f"compressed as {syntax.name}")
    return found


def _grey(stored: np.ndarray, dataset: Dataset, window: Window | None) -> np.ndarray:
    if window:
        dataset.WindowCenter, dataset.WindowWidth = window
        dataset.VOILUTFunction = "LINEAR"
    values, black, white = _displayed(stored, dataset)
    share = (values - black) / max(white - black, 1e-9)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    return np.rint(255 * share.clip(0, 1)).astype(np.uint8)


def _displayed(stored: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, float, float]:
    """Values after modality and window, and those that are black and white."""
    from pydicom.pixels import apply_rescale, apply_voi, apply_windowing

    values = apply_rescale(stored, dataset)
    if dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        with np.errstate(over="ignore"):
            black, white = apply_windowing(np.array([-FAR, FAR]), dataset)
        return apply_windowing(values, dataset), float(black), float(white)
    if dataset.get("VOILUTSequence"):
        length, first, _ = dataset.VOILUTSequence[0].LUTDescriptor
        ends = apply_voi(np.array([first, first + (length or 2**16) - 1]), dataset)
        shown = apply_voi(np.rint(values).astype(np.int64), dataset)
        return shown.astype(np.float64), float(min(ends)), float(max(ends))
    if stored.dtype == np.uint8 and np.array_equal(values, stored):
        return values, 0.0, 2.0**dataset.BitsStored - 1
    padding = dataset.get("PixelPaddingValue")
    values = values.astype(np.float64)
    meant = values if padding is None else values[stored != padding]
    return values, float(meant.min(initial=np.inf)), float(meant.max(initial=-np.inf))


def _colour(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    bits = dataset.BitsStored
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        bits = 8 * stored.itemsize
    if stored.ndim != 3 or stored.shape[2] != 3:
        raise ValueError(f"pixels of shape {stored.shape}")
    return np.rint(stored * (255 / (2**bits - 1))).astype(np.uint8)


def _undecodable(path: str | os.PathLike[str], error: Exception) -> BadImageError:
    reason = " ".join(str(error).split())[:300]
    mend = "copy the file again, or export it as PNG"
    if isinstance(error, NotImplementedError):
        mend = (
            "for JPEG-LS pip install 'biclip_jax[medical]', for lossless JPEG "
            "pylibjpeg-libjpeg, or export it as PNG"
        )
    found = f"a DICOM file that cannot be decoded ({type(error).__name__}: {reason})"
    return _bad(path, found, "one whole picture", mend)


def _bad(path: str | os.PathLike[str], found: str, expected: str, mend: str) -> BadImageError:
    return BadImageError(f"{os.fspath(path)}: found {found}; expected {expected}; {mend}.")
