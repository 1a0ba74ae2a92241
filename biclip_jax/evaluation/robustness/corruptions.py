"""Image corruptions with five severities each; pure functions on the device.

Images are float32 (B, H, W, C) in [0, 1]. Lengths in pixels refer to a side of 224 and scale with
the side of the image. Random corruptions take one key per example, so the batch does not change the
result. `jpeg` is a codec and runs on the host.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

REFERENCE_SIZE = 224  # pixels
ATTENUATION = 4.0  # of a pixel of value 1, in low_dose_ct
ELECTRONIC_NOISE = 10.0  # counts, in low_dose_ct


class Corruption(NamedTuple):
    """One kind of corruption.

    Attributes:
      apply: Function (image, keys, strength) -> image.
      strengths: Strengths of the severities 1 to 5.
    """

    apply: Callable[[Array, Array, float], Array]
    strengths: tuple[float, ...]


def gaussian_noise(
    image: Float[Array, "b h w c"], keys: Key[Array, " b"], sd: float
) -> Float[Array, "b h w c"]:
    """Returns clip(x + N(0, sd^2), 0, 1)."""
    noise = jax.vmap(lambda key: jax.random.normal(key, image.shape[1:]))(keys)
    return jnp.clip(image + sd * noise, 0.0, 1.0)


def motion_blur(
    image: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    length: float,
    angle: float = 45.0,
) -> Float[Array, "b h w c"]:
    """Averages `length` bilinear samples on a centered line, one reference pixel apart.

    The line rises to the right by `angle` degrees. The border repeats the edge pixels.
    """
    del keys
    steps = (np.arange(length) - (length - 1) / 2) * _pixel(image)
    rows, columns = -steps * math.sin(math.radians(angle)), steps * math.cos(math.radians(angle))
    reach = math.ceil(np.abs(np.stack([rows, columns])).max()) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for row, column in zip(rows, columns, strict=True):
        top, left = math.floor(row), math.floor(column)
        for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            weight = (1 - abs(row - y)) * (1 - abs(column - x))
            kernel[y + reach, x + reach] += weight / len(steps)
    return _convolve(image, kernel)


def gaussian_blur(
    image: Float[Array, "b h w c"], keys: Key[Array, " b"], sd: float
) -> Float[Array, "b h w c"]:
    """Blurs with a Gaussian of `sd` reference pixels, cut at 4 sd, with edge padding."""
    del keys
    sd = sd * _pixel(image)
    reach = max(math.ceil(4 * sd), 1)
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sd) ** 2)
    line /= line.sum()
    return _convolve(_convolve(image, line[:, None]), line[None, :])


def low_contrast(
    image: Float[Array, "b h w c"], keys: Key[Array, " b"], factor: float
) -> Float[Array, "b h w c"]:
    """Returns m + factor (x - m), where m is the mean of the image."""
    del keys
    mean = image.mean(axis=(1, 2, 3), keepdims=True)
    return mean + factor * (image - mean)


def gamma(
    image: Float[Array, "b h w c"], keys: Key[Array, " b"], exponent: float
) -> Float[Array, "b h w c"]:
    """Returns x^exponent."""
    del keys
    return image**exponent


def low_dose_ct(
    image: Float[Array, "b h w c"], keys: Key[Array, " b"], photons: float
) -> Float[Array, "b h w c"]:
    """Simulates photon noise through Beer-Lambert attenuation.

    a = 4 x; n ~ Poisson(photons e^-a) + N(0, 10^2), at least 1; the result is -log(n / photons) /
    4, clipped to [0, 1].
    """

    def corrupt_one(key, image):
        count_key, noise_key = jax.random.split(key)
        counts = jax.random.poisson(count_key, photons * jnp.exp(-ATTENUATION * image))
        electronic = ELECTRONIC_NOISE * jax.random.normal(noise_key, image.shape)
        detected = jnp.maximum(counts + electronic, 1.0)
        return jnp.clip(-jnp.log(detected / photons) / ATTENUATION, 0.0, 1.0)

    return jax.vmap(corrupt_one)(keys, image)


def downsample(
    image: Float[Array, "b h w c"], keys: Key[Array, " b"], factor: float
) -> Float[Array, "b h w c"]:
    """Resizes to 1 / factor of the side and back, bilinearly without antialiasing."""
    del keys
    b, height, width, channels = image.shape
    small = (b, max(round(height / factor), 1), max(round(width / factor), 1), channels)
    shrunk = jax.image.resize(image, small, "bilinear", antialias=False)
    return jax.image.resize(shrunk, image.shape, "bilinear", antialias=False)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, (0.02, 0.05, 0.10, 0.15, 0.20)),  # sd
    "motion_blur": Corruption(motion_blur, (3, 7, 11, 15, 21)),  # pixels at 224
    "low_contrast": Corruption(low_contrast, (0.9, 0.75, 0.5, 0.35, 0.2)),  # factor
    "gamma": Corruption(gamma, (0.7, 0.5, 0.4, 0.3, 0.25)),  # exponent
    "low_dose_ct": Corruption(low_dose_ct, (1e5, 3e4, 1e4, 3e3, 1e3)),  # photons
    "gaussian_blur": Corruption(gaussian_blur, (0.5, 1, 2, 3, 4)),  # sd in pixels at 224
    "downsample": Corruption(downsample, (1.5, 2, 3, 4, 6)),  # factor
}
JPEG_QUALITIES = (80, 50, 30, 15, 8)
NAMES = (*CORRUPTIONS, "jpeg")
SEVERITIES = (1, 2, 3, 4, 5)


def on_device(
    name: str, severity: int, seed: int = 0
) -> Callable[[Float[Array, "b h w c"], UInt32[Array, " b"]], Float[Array, "b h w c"]]:
    """Returns a function (image, `hash_ids` of the examples) -> corrupted image.

    Args:
      name: One of `CORRUPTIONS`.
      severity: 1 to 5.
      seed: Seed of the evaluation.
    """
    corruption = CORRUPTIONS[name]

    def apply(image, hashes):
        keys = example_keys(hashes, name, severity, seed)
        return corruption.apply(image, keys, corruption.strengths[severity - 1])

    return apply


def example_keys(
    hashes: UInt32[Array, " b"], name: str, severity: int, seed: int = 0
) -> Key[Array, " b"]:
    """Derives one key per example from (seed, image id, name, severity).

    Args:
      hashes: `hash_ids` of the examples.
      name, severity: The corruption.
      seed: Seed of the evaluation.
    """
    stream = jax.random.fold_in(jax.random.key(seed), NAMES.index(name))
    stream = jax.random.fold_in(stream, severity)
    return jax.vmap(jax.random.fold_in, (None, 0))(stream, hashes)


def jpeg(image: np.ndarray, severity: int) -> np.ndarray:
    """Compresses a uint8 image (H, W, 1 or 3) as JPEG at the quality of `severity`, on the host."""
    from PIL import Image

    buffer = io.BytesIO()
    pil_image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    pil_image.save(buffer, "JPEG", quality=JPEG_QUALITIES[severity - 1])
    return np.asarray(Image.open(buffer)).reshape(image.shape)


def _pixel(image: Array) -> float:
    """Returns the length of a reference pixel, in pixels of this image."""
    return image.shape[1] / REFERENCE_SIZE


def _convolve(image: Float[Array, "b h w c"], kernel: np.ndarray) -> Float[Array, "b h w c"]:
    """Convolves each channel with a kernel of odd sides; the border repeats the edge pixels."""
    b, height, width, channels = image.shape
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    maps = image.transpose(0, 3, 1, 2).reshape(b * channels, height, width, 1)
    pad = ((0, 0), (rows, rows), (columns, columns), (0, 0))
    maps = jax.lax.conv_general_dilated(
        jnp.pad(maps, pad, mode="edge"),
        jnp.asarray(kernel, image.dtype)[:, :, None, None],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return maps.reshape(b, channels, height, width).transpose(0, 2, 3, 1)
