"""Pictures and masks from disk to arrays and back, distrusting every file."""

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

# Naming the formats keeps pillow's other decoders (EPS, PSD, FITS, ...) away from foreign files.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP")
LOSSY_NOISE = 16
# A mask with a larger share of pixels between black and white, and with more values, is a picture;
# those of QaTa-COV19 and BUSI have at least 0.2 and 53, nearly all over 0.5; their masks have none.
MOST_GREY, MOST_CLASSES = 0.25, 32

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
    """Reads a picture as 8-bit grey or RGB, upright as its EXIF orientation says.

    16-bit grey is divided by 257; palette, CMYK and other colour spaces become RGB; an alpha
    channel is dropped, not blended. A grey picture stored as RGB stays RGB. DICOM: see
    `dicom.read`.

    Args:
      path: a PNG, JPEG, BMP, TIFF, WebP or DICOM file holding one picture.
      window: of a DICOM file's grey values, instead of its own.

    Returns:
      (H, W, C) uint8, C = 1 (grey) or 3 (RGB).

    Raises:
      BadImageError: the file is missing, damaged, too large, or of another kind.
    """
    pixels = dicom.read(path, window) if dicom.is_dicom(path) else _decode(path)[0]
    if pixels.dtype == np.uint16:
        pixels = _to_8_bit(pixels)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def is_image_name(path: str | os.PathLike[str]) -> bool:
    """Whether a file's suffix is one of a picture."""
    return PurePath(path).suffix.lower() in SUFFIXES


def image_stem(path: str | os.PathLike[str]) -> str:
    """A file's name without a picture's suffix; the numbers and dots of a DICOM archive stay."""
    return PurePath(path).stem if is_image_name(path) else PurePath(path).name


def read_mask(path: str | os.PathLike[str], method: str = "antialiased") -> np.ndarray:
    """Reads a mask: foreground is above 127, or nonzero where the maximum is 1.

    16 bits are divided by 257 where they are used, and 255 is foreground where they are not.

    Args:
      path: a picture file as `read_image` takes, but for DICOM; colour is turned into grey first.
      method: of `RESIZE_METHODS`: with "opencv" 127 itself is foreground, too, as the MedCLIPSeg
        reference has it when it trains; masks of 0 and 255 are the same to both.

    Returns:
      (H, W, 1) uint8 in {0, 1}.

    Raises:
      BadImageError: as `read_image`, and where the brightest pixel of a lossless file lies in
        2 to the darkest foreground: class numbers or a dim palette would silently become an empty
        mask; or where it is a picture, by its many shades of grey.
    """
    if dicom.is_dicom(path):
        raise bad_image(path, "a DICOM file as a mask", "a picture file", "export the mask as PNG")
    pixels, file_format = _decode(path)
    darkest = 127 if method == "opencv" else 128
    if pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if pixels.max() == 1:
        return (pixels > 0).astype(np.uint8)[..., None]
    if pixels.dtype == np.uint16:  # some write 0 and 255 as 16 bits
        pixels = _to_8_bit(pixels) if pixels.max() > 255 else pixels.astype(np.uint8)
    noise = LOSSY_NOISE if file_format in LOSSY_FORMATS else 0
    if noise < pixels.max() < darkest:
        raise bad_image(
            path,
            f"a mask whose brightest pixel is {pixels.max()}",
            "0 and 1, or 0 and 255",
            "write foreground as 255",
        )
    grey = np.mean((pixels > 31) & (pixels < 224))
    if grey > MOST_GREY and len(np.unique(pixels)) > MOST_CLASSES:
        raise bad_image(
            path,
            f"a mask {grey:.0%} of whose pixels are shades of grey",
            "0 and 1, or 0 and 255",
            "look whether this is a picture instead of its mask",
        )
    return (pixels >= darkest).astype(np.uint8)[..., None]


def resize_image(image: np.ndarray, size: int, method: str = "antialiased") -> np.ndarray:
    """Resizes (H, W, C) uint8 to (size, size, C) uint8, bilinear.

    The aspect ratio is not kept; a picture of that size already is returned as it is.

    Args:
      image: 8-bit picture.
      size: side of the result in pixels.
      method: of `RESIZE_METHODS`: "antialiased" averages the pixels that fall together; "opencv"
        weighs the two nearest a direction alone, to the bit as cv2.resize does.

    Raises:
      ValueError: another method.
    """
    _check_method(method)
    if image.shape[:2] == (size, size):
        return image
    if method == "opencv":
        return opencv_resize.bilinear(image, size, size)
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    resized = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
    return resized.reshape(size, size, image.shape[2])


def resize_mask(mask: np.ndarray, size: int, method: str = "antialiased") -> np.ndarray:
    """Resizes (H, W, 1) {0, 1} to (size, size, 1) uint8 {0, 1}.

    Args:
      mask: 8-bit mask.
      size: side of the result in pixels.
      method: of `RESIZE_METHODS`: "antialiased" is foreground where it covers at least half;
        "opencv" takes one pixel for all, as cv2.resize's nearest neighbour does.

    Raises:
      ValueError: another method.
    """
    _check_method(method)
    if mask.shape[:2] == (size, size):
        return mask
    if method == "opencv":
        return opencv_resize.nearest(mask, size, size)
    picture = Image.fromarray(mask[..., 0].astype(np.float32))
    cover = np.asarray(picture.resize((size, size), Image.Resampling.BOX))
    # The tolerance keeps an exact half foreground whatever its sum rounds to.
    return (cover >= 0.5 - 1e-6).astype(np.uint8)[..., None]


def _check_method(method: str) -> None:
    if method not in RESIZE_METHODS:
        raise ValueError(f"method: found {method!r}; expected one of {', '.join(RESIZE_METHODS)}")


def encode_png(array: np.ndarray) -> bytes:
    """Encodes (H, W), (H, W, 1) or (H, W, 3) uint8, or (H, W) uint16, as PNG bytes."""
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
    """Decodes 8-bit bytes of `encode_png` to (H, W, C) uint8, C = 1 or 3."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        array = np.array(picture)
    return array if array.ndim == 3 else array[..., None]


def write_png(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Writes an array that `encode_png` takes; readers see the old file or the whole new one."""
    data = encode_png(array)
    with files.atomic_write(path) as part:
        part.write_bytes(data)


def _decode(path: str | os.PathLike[str]) -> tuple[np.ndarray, str]:
    """Returns ((H, W) uint8 or uint16, or (H, W, 3) uint8; the name of the file's format)."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            _check_header(path, picture)
            file_format = picture.format or "unknown"
            picture.load()
            pixels = _to_array(path, ImageOps.exif_transpose(picture))
    except FileNotFoundError as error:
        raise bad_image(path, "no such file", "a picture", "check the name") from error
    except _DECODER_ERRORS as error:
        raise bad_image(
            path,
            f"a file that cannot be decoded ({type(error).__name__}: {error})",
            "a whole PNG, JPEG, BMP, TIFF, WebP or DICOM picture",
            "export or copy the file again",
        ) from error
    return pixels, file_format


def _check_header(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Raises BadImageError for a size or page count that must not be decoded."""
    width, height = picture.size
    if not 0 < width * height <= MAX_PIXELS:
        raise bad_image(
            path,
            f"a header of {width} x {height} pixels",
            f"1 to {MAX_PIXELS} pixels",
            "scale the picture down",
        )
    # A camera's multi-picture JPEG (MPO) carries previews after its one picture.
    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if frames != 1:
        raise bad_image(path, f"{frames} pages or frames", "one picture", "export each as a file")


def _to_array(path: str | os.PathLike[str], picture: Image.Image) -> np.ndarray:
    """Turns a decoded pillow picture of any mode into (H, W) or (H, W, 3) pixels."""
    mode = picture.mode
    if mode in ("1", "L", "LA", "La"):
        return np.array(picture.convert("L") if mode != "LA" else picture.getchannel("L"))
    if mode.startswith("I"):
        return _to_16_bit(path, np.array(picture))
    if mode == "F":
        raise bad_image(path, "floating-point pixels", "8 or 16 bits", "save it as 8-bit PNG")
    return np.array(picture.convert("RGB"))


def _to_16_bit(path: str | os.PathLike[str], pixels: np.ndarray) -> np.ndarray:
    """Narrows pillow's 16- or 32-bit integers (H, W) to uint16, refusing what does not fit."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise bad_image(
            path,
            f"grey levels {pixels.min()}..{pixels.max()}",
            "0..65535",
            "window the picture and save it as 8-bit PNG",
        )
    return pixels.astype(np.uint16)


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Maps uint16 0..65535 to the nearest of uint8 0..255."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def resize_probability(probs: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (H, W) of floats brought to (height, width), bilinear; float32.

    Shrinking averages over the pixels that fall together.
    """
    if probs.shape == (height, width):
        return np.asarray(probs, np.float32)
    picture = Image.fromarray(np.asarray(probs, np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
