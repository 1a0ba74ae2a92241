"""Reads, resizes and writes images and masks; input files are not trusted."""

from __future__ import annotations

import io
import os
import struct
from pathlib import PurePath

import numpy as np
from PIL import Image, ImageOps

from biclip_jax.core import files
from biclip_jax.core.errors import bad_image
from biclip_jax.data import dicom, opencv_resize

MAX_PIXELS = 64 * 2**20
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm")

# An explicit list keeps untrusted files away from pillow's other decoders (EPS, PSD, FITS, ...).
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP")
LOSSY_NOISE = 16
# A mask with a larger fraction of intermediate intensities, and with more distinct values, is an
# image: those of QaTa-COV19 and BUSI have at least 0.2 (nearly all over 0.5) and 53; masks none.
MAX_GREY_FRACTION, MAX_CLASSES = 0.25, 32

RESIZE_METHODS = ("antialiased", "opencv")

_DECODER_ERRORS = (
    OSError,
    Image.DecompressionBombError,
    Warning,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
    SyntaxError,
    LookupError,
    ArithmeticError,
    AssertionError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
)


def read_image(path: str | os.PathLike[str], window: dicom.Window | None = None) -> np.ndarray:
    """Reads an image as 8-bit greyscale or RGB, with its EXIF orientation applied.

    16-bit greyscale is divided by 257; palette, CMYK and other colour spaces become RGB; an alpha
    channel is dropped, not blended. A greyscale image stored as RGB stays RGB. For DICOM see
    `dicom.read`.

    Args:
      path: PNG, JPEG, BMP, TIFF, WebP or DICOM file with one image.
      window: Intensity window of a DICOM file, instead of the window in the file.

    Returns:
      (H, W, C) uint8, C = 1 (greyscale) or 3 (RGB).

    Raises:
      BadImageError: The file is missing, damaged, too large, or not an image.
    """
    pixels = dicom.read(path, window) if dicom.is_dicom(path) else _decode(path)[0]
    if pixels.dtype == np.uint16:
        pixels = _to_8_bit(pixels)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def is_image_name(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file has an image suffix."""
    return PurePath(path).suffix.lower() in SUFFIXES


def image_stem(path: str | os.PathLike[str]) -> str:
    """Returns a file's name without its image suffix; a DICOM archive's dotted numbers stay."""
    return PurePath(path).stem if is_image_name(path) else PurePath(path).name


def read_mask(path: str | os.PathLike[str], method: str = "antialiased") -> np.ndarray:
    """Reads a mask: foreground is above 127, or nonzero if the maximum is 1.

    16-bit masks are divided by 257 if their maximum exceeds 255; otherwise 255 is foreground.

    Args:
      path: Image file as in `read_image`, except DICOM; colour is converted to greyscale first.
      method: Value of `RESIZE_METHODS`. With "opencv" 127 is foreground, too, as in the training
        code of the MedCLIPSeg reference; masks of 0 and 255 are the same with both.

    Returns:
      (H, W, 1) uint8 in {0, 1}.

    Raises:
      BadImageError: See `read_image`. Also raised if the brightest pixel of a lossless file is
        above 1 but below the foreground threshold (class numbers or a dim palette would silently
        become an empty mask), or if many intermediate intensities show that it is an image.
    """
    if dicom.is_dicom(path):
        raise bad_image(path, "a DICOM file as a mask", "an image file", "export the mask as PNG")
    pixels, file_format = _decode(path)
    threshold = 127 if method == "opencv" else 128
    if pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if pixels.max() == 1:
        return (pixels > 0).astype(np.uint8)[..., None]
    if pixels.dtype == np.uint16:  # some files store 0 and 255 in 16 bits
        pixels = _to_8_bit(pixels) if pixels.max() > 255 else pixels.astype(np.uint8)
    noise = LOSSY_NOISE if file_format in LOSSY_FORMATS else 0
    if noise < pixels.max() < threshold:
        raise bad_image(
            path,
            f"a mask whose brightest pixel is {pixels.max()}",
            "0 and 1, or 0 and 255",
            "write foreground as 255",
        )
    grey_fraction = np.mean((pixels > 31) & (pixels < 224))
    if grey_fraction > MAX_GREY_FRACTION and len(np.unique(pixels)) > MAX_CLASSES:
        raise bad_image(
            path,
            f"a mask with intermediate intensities in {grey_fraction:.0%} of its pixels",
            "0 and 1, or 0 and 255",
            "check whether this is an image instead of its mask",
        )
    return (pixels >= threshold).astype(np.uint8)[..., None]


def resize_image(image: np.ndarray, size: int, method: str = "antialiased") -> np.ndarray:
    """Resizes (H, W, C) uint8 to (size, size, C) uint8, bilinear.

    The aspect ratio is not kept; an image that already has this size is returned unchanged.

    Args:
      image: 8-bit image.
      size: Side of the result in pixels.
      method: Value of `RESIZE_METHODS`. "antialiased" averages over the source pixels; "opencv"
        interpolates between the two nearest per axis, bit for bit as cv2.resize does.

    Raises:
      ValueError: Unknown method.
    """
    _check_method(method)
    if image.shape[:2] == (size, size):
        return image
    if method == "opencv":
        return opencv_resize.bilinear(image, size, size)
    pil_image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    resized = np.asarray(pil_image.resize((size, size), Image.Resampling.BILINEAR))
    return resized.reshape(size, size, image.shape[2])


def resize_mask(mask: np.ndarray, size: int, method: str = "antialiased") -> np.ndarray:
    """Resizes (H, W, 1) {0, 1} to (size, size, 1) uint8 {0, 1}.

    Args:
      mask: 8-bit mask.
      size: Side of the result in pixels.
      method: Value of `RESIZE_METHODS`. "antialiased" is foreground where the mask covers at least
        half of the pixel; "opencv" takes the nearest neighbour, as cv2.resize does.

    Raises:
      ValueError: Unknown method.
    """
    _check_method(method)
    if mask.shape[:2] == (size, size):
        return mask
    if method == "opencv":
        return opencv_resize.nearest(mask, size, size)
    pil_image = Image.fromarray(mask[..., 0].astype(np.float32))
    coverage = np.asarray(pil_image.resize((size, size), Image.Resampling.BOX))
    # The tolerance makes an exact half foreground, whatever its sum rounds to.
    return (coverage >= 0.5 - 1e-6).astype(np.uint8)[..., None]


def _check_method(method: str) -> None:
    if method not in RESIZE_METHODS:
        raise ValueError(f"method: found {method!r}; expected one of {', '.join(RESIZE_METHODS)}")


def encode_png(array: np.ndarray) -> bytes:
    """Encodes (H, W), (H, W, 1) or (H, W, 3) uint8, or (H, W) uint16, as PNG."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    colour = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if not (grey or colour):
        raise ValueError(
            f"array: found {array.shape} {array.dtype}, "
            "expected (H, W) uint8 or uint16, or (H, W, 3) uint8"
        )
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """Decodes an 8-bit PNG of `encode_png` to (H, W, C) uint8, C = 1 or 3."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as pil_image:
        array = np.array(pil_image)
    return array if array.ndim == 3 else array[..., None]


def write_png(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Writes an array as PNG, see `encode_png`; readers see the old or the complete new file."""
    data = encode_png(array)
    with files.atomic_write(path) as part:
        part.write_bytes(data)


def _decode(path: str | os.PathLike[str]) -> tuple[np.ndarray, str]:
    """Returns (pixels, format): (H, W) uint8 or uint16, or (H, W, 3) uint8; pillow's name."""
    try:
        with Image.open(path, formats=FORMATS) as pil_image:
            _check_header(path, pil_image)
            file_format = pil_image.format or "unknown"
            pil_image.load()
            pixels = _to_array(path, ImageOps.exif_transpose(pil_image))
    except FileNotFoundError as error:
        raise bad_image(path, "no such file", "an image", "check the name") from error
    except _DECODER_ERRORS as error:
        raise bad_image(
            path,
            f"a file that cannot be decoded ({type(error).__name__}: {error})",
            "a complete PNG, JPEG, BMP, TIFF, WebP or DICOM image",
            "export or copy the file again",
        ) from error
    return pixels, file_format


def _check_header(path: str | os.PathLike[str], pil_image: Image.Image) -> None:
    """Raises BadImageError for a size or page count that must not be decoded."""
    width, height = pil_image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise bad_image(
            path,
            f"a header of {width} x {height} pixels",
            f"1 to {MAX_PIXELS} pixels",
            "downscale the image",
        )
    # A camera's multi-picture JPEG (MPO) has one image followed by previews.
    frames = 1 if pil_image.format == "MPO" else getattr(pil_image, "n_frames", 1)
    if frames != 1:
        raise bad_image(path, f"{frames} pages or frames", "one image", "export each as a file")


def _to_array(path: str | os.PathLike[str], pil_image: Image.Image) -> np.ndarray:
    """Converts a decoded pillow image of any mode to (H, W) or (H, W, 3) pixels."""
    mode = pil_image.mode
    if mode in ("1", "L", "LA", "La"):
        return np.array(pil_image.convert("L") if mode != "LA" else pil_image.getchannel("L"))
    if mode.startswith("I"):
        return _to_16_bit(path, np.array(pil_image))
    if mode == "F":
        raise bad_image(path, "floating-point pixels", "8 or 16 bits", "save it as 8-bit PNG")
    return np.array(pil_image.convert("RGB"))


def _to_16_bit(path: str | os.PathLike[str], pixels: np.ndarray) -> np.ndarray:
    """Converts pillow's 16- or 32-bit integers (H, W) to uint16; refuses other values."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise bad_image(
            path,
            f"intensities {pixels.min()}..{pixels.max()}",
            "0..65535",
            "window the image and save it as 8-bit PNG",
        )
    return pixels.astype(np.uint16)


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Maps uint16 0..65535 to the nearest value of uint8 0..255."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def resize_probability(probs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a map (H, W) of floats to (height, width) float32, bilinear.

    Downscaling averages over the source pixels.
    """
    if probs.shape == (height, width):
        return np.asarray(probs, np.float32)
    pil_image = Image.fromarray(np.asarray(probs, np.float32))
    return np.asarray(pil_image.resize((width, height), Image.Resampling.BILINEAR))
