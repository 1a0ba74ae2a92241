"""Weak and strong views, computed on the device by pure functions of random keys.

See the columns `published` and `full` of docs/method.md. Images are float32 (H, W, C) in [0, 1].
Every example has its own key, so any number of devices gives the same images; CutMix pairs the
rows 2j and 2j + 1 of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

BLUR_TAPS = 5
ELASTIC_GRID = 7  # control points of the elastic deformation, each way
# Indices of random streams; those below 16 could collide with the keys of `split`.
BOX_STREAM, ELASTIC_STREAM, STRONG_PHOTOMETRIC_STREAM = range(
    16, 19
)  # folded into the key of a strong view
PHOTOMETRIC_STREAM = 16  # folded into the geometry key
CUTMIX_AREA = (0.1, 0.5)  # share of the image; a larger box would leave the minority to the row


class Geometry(NamedTuple):
    """Ranges and probabilities of the geometric transform; angles in degrees, shifts in widths.

    With `integer_degrees` the transform only rotates, with probability `affine`, by a whole number
    of degrees and with nearest-neighbour sampling, as MedCLIPSeg's released code does.
    """

    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    affine: float = 0.7
    rotation: float = 20.0
    translation: float = 0.1
    scale_low: float = 0.8
    scale_high: float = 1.2
    integer_degrees: bool = False


def make_geometry(config: Mapping[str, Any]) -> Geometry:
    """Builds the geometry from its config fields.

    Raises:
      ValueError: integer_degrees is combined with flips, shifts, scaling or a fractional rotation.
    """
    geometry = Geometry(**config)
    rotation_only = Geometry(0.0, 0.0, geometry.affine, geometry.rotation, 0.0, 1.0, 1.0, True)
    if geometry.integer_degrees and geometry != rotation_only:
        raise ValueError(
            "views.integer_degrees only rotates the images; set the flips and "
            "views.translation to 0, views.scale_low and views.scale_high to 1"
        )
    if geometry.integer_degrees and geometry.rotation % 1:
        raise ValueError(
            f"views.rotation is {geometry.rotation}; views.integer_degrees requires an integer"
        )
    return geometry


class Photometric(NamedTuple):
    """Largest changes of the intensities of both views, either sign: m + (1 + c) (x - m) + b.

    m is the mean of the image.
    """

    brightness: float = 0.0
    contrast: float = 0.0


class Strong(NamedTuple):
    """Augmentations of the strong view, in addition to the weak ones; 0 disables one at no cost.

    Attributes:
      photometric: Whether to apply the published augmentation, see `published_photometric`.
      noise: Largest standard deviation of Gaussian noise.
      brightness, contrast: Largest changes, either sign, as in `Photometric`.
      elastic: Standard deviation of the control points' displacements, in widths.
      cutmix: Probability that a pair of rows exchanges a box.
    """

    photometric: bool = True
    noise: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    elastic: float = 0.0
    cutmix: float = 0.0


class Deformation(NamedTuple):
    """Spatial changes of the strong view of a batch; None where disabled.

    Attributes:
      source: (B, H, W, 2) source position (row, column) of each pixel.
      box: (B, H, W, 1) true where a row shows its partner.
    """

    source: Float[Array, "b h w 2"] | None
    box: Bool[Array, "b h w 1"] | None


def transform(
    keys: Key[Array, " b"], maps: Sequence[Float[Array, "b h w _"]], geometry: Geometry
) -> tuple[list[Float[Array, "b h w _"]], Bool[Array, " b"]]:
    """Applies the same random geometric transform to several maps of each example; 0 outside.

    Returns:
      The maps, and (B,) whether the example was flipped left-right.
    """
    if geometry.integer_degrees:
        rotate = jax.vmap(lambda key, stack: random_rotation(key, stack, geometry))
        transformed = rotate(keys, jnp.concatenate(list(maps), axis=-1))
        return _unstack(transformed, maps), jnp.zeros(len(keys), bool)
    matrix, shift, flipped = jax.vmap(lambda key: random_geometry(key, geometry))(keys)
    transformed = jax.vmap(warp)(jnp.concatenate(list(maps), axis=-1), matrix, shift)
    return _unstack(transformed, maps), flipped


def adjust_photometric(
    keys: Key[Array, " b"], images: Float[Array, "b h w 3"], photometric: Photometric
) -> Float[Array, "b h w 3"]:
    """Changes contrast (about each image's mean) and brightness; the result is clipped to [0, 1].

    Uses the geometry keys. Does nothing if `photometric` is disabled.
    """
    if photometric == Photometric():
        return images

    def adjust_image(key: Any, image: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, PHOTOMETRIC_STREAM))
        changed = _adjust(keys[0], keys[1], image, photometric.contrast, photometric.brightness)
        return jnp.clip(changed, 0.0, 1.0)

    return jax.vmap(adjust_image)(keys, images)


def random_deformation(
    keys: Key[Array, " b"], height: int, width: int, strong: Strong
) -> Deformation:
    """Draws the elastic deformation of each example and the CutMix box of each pair.

    Args:
      keys: (B,) one key per example; B is even if CutMix is enabled.
      height, width: Size of the maps.
      strong: Ranges.
    """
    source = box = None
    if strong.elastic:
        source = jax.vmap(lambda key: elastic_source(key, height, width, strong.elastic))(keys)
    if strong.cutmix:
        pairs = jax.vmap(lambda key: random_box(key, height, width, strong.cutmix))(keys[::2])
        box = jnp.repeat(pairs, 2, axis=0)
    return Deformation(source, box)


def deform(
    maps: Sequence[Float[Array, "b h w _"]], deformation: Deformation
) -> list[Float[Array, "b h w _"]]:
    """Applies the elastic deformation to a batch of maps, then pastes the boxes of the partners."""
    stack = jnp.concatenate(list(maps), axis=-1)
    if deformation.source is not None:
        stack = jax.vmap(sample)(stack, deformation.source)
    if deformation.box is not None:
        stack = jnp.where(deformation.box, swap_pairs(stack), stack)
    return _unstack(stack, maps)


def mix_vectors(vectors: Float[Array, "b d"], deformation: Deformation) -> Float[Array, "b d"]:
    """Mixes each vector of a batch with that of its partner by the area of the box."""
    if deformation.box is None:
        return vectors
    area = deformation.box.mean((1, 2, 3))[:, None]
    return (1 - area) * vectors + area * swap_pairs(vectors)


def swap_pairs(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Exchanges the rows 2j and 2j + 1."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def strong_photometric(
    key: Key[Array, ""], image: Float[Array, "h w 3"], strong: Strong
) -> Float[Array, "h w 3"]:
    """Applies the photometric changes of the strong view to one image; clips to [0, 1]."""
    if strong.photometric:
        image = published_photometric(key, image)
    keys = jax.random.split(jax.random.fold_in(key, STRONG_PHOTOMETRIC_STREAM), 4)
    image = _adjust(keys[0], keys[1], image, strong.contrast, strong.brightness)
    if strong.noise:
        # The same noise in all channels, because most medical images are greyscale.
        noise = jax.random.normal(keys[2], (*image.shape[:2], 1))
        image = image + _uniform(keys[3], 0.0, strong.noise) * noise
    return jnp.clip(image, 0.0, 1.0)


def elastic_source(
    key: Key[Array, ""], height: int, width: int, scale: float
) -> Float[Array, "h w 2"]:
    """Returns the source position of each pixel for random displacements of a coarse point grid.

    The displacements are interpolated cubically, which makes the field smooth.
    """
    key = jax.random.fold_in(key, ELASTIC_STREAM)
    shifts = scale * jax.random.normal(key, (ELASTIC_GRID, ELASTIC_GRID, 2))
    field = jax.image.resize(shifts, (height, width, 2), "cubic")
    return _pixel_grid(height, width) + field * jnp.array([height, width])


def random_box(
    key: Key[Array, ""], height: int, width: int, probability: float
) -> Bool[Array, "h w 1"]:
    """Draws a box of CUTMIX_AREA of the image with an aspect ratio up to 2.

    The box is empty with probability 1 - `probability`.
    """
    keys = jax.random.split(jax.random.fold_in(key, BOX_STREAM), 4)
    area = _uniform(keys[0], *CUTMIX_AREA)
    stretch = jnp.exp2(_uniform(keys[1], -0.5, 0.5))
    sides = jnp.minimum(jnp.sqrt(area) * jnp.stack([stretch, 1 / stretch]), 1.0)
    start = jax.random.uniform(keys[2], (2,)) * (1 - sides)
    position = (_pixel_grid(height, width) + 0.5) / jnp.array([height, width])
    inside = ((position >= start) & (position < start + sides)).all(-1, keepdims=True)
    return inside & jax.random.bernoulli(keys[3], probability)


def random_geometry(
    key: Key[Array, ""], geometry: Geometry
) -> tuple[Float[Array, "2 2"], Float[Array, " 2"], Bool[Array, ""]]:
    """Draws flips and an affine map as one matrix and a shift, from output to input.

    Coordinates are (y, x) from the centre, in units of the image's width. The third value is true
    if left and right are exchanged.
    """
    keys = jax.random.split(key, 6)
    angle = jnp.deg2rad(_uniform(keys[0], -geometry.rotation, geometry.rotation))
    scale = _uniform(keys[1], geometry.scale_low, geometry.scale_high)
    shift = geometry.translation * jax.random.uniform(keys[2], (2,), minval=-1.0, maxval=1.0)
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    rotation = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
    affine = jax.random.bernoulli(keys[3], geometry.affine)
    matrix = jnp.where(affine, rotation, jnp.eye(2))
    flip_y = 1 - 2.0 * jax.random.bernoulli(keys[4], geometry.vertical_flip)
    flipped = jax.random.bernoulli(keys[5], geometry.horizontal_flip)
    flips = jnp.stack([flip_y, 1 - 2.0 * flipped])
    return matrix * flips[:, None], jnp.where(affine, shift, 0.0), flipped


def random_rotation(
    key: Key[Array, ""], image: Float[Array, "h w c"], geometry: Geometry
) -> Float[Array, "h w c"]:
    """Rotates by whole degrees, uniform in [-rotation, rotation]; see `rotate_nearest`."""
    apply_key, angle_key = jax.random.split(key)
    largest = int(geometry.rotation)
    angle = jax.random.randint(angle_key, (), -largest, largest + 1)
    rotated = rotate_nearest(
        image, jnp.asarray(rotation_table(largest, *image.shape[:2]))[angle + largest]
    )
    return jnp.where(jax.random.bernoulli(apply_key, geometry.affine), rotated, image)


def rotation_table(largest: int, height: int, width: int) -> np.ndarray:
    """Returns the rows that `rotate_nearest` takes for -largest to largest degrees.

    The rows of each matrix are x and y, the columns x, y and 1; it maps output to input positions
    in units of 1/65536 pixel. Pillow computes in the same units, so rotated pixels match it
    exactly.

    Returns:
      (2 largest + 1, 2, 3) int32.
    """
    angles = -np.deg2rad(np.arange(-largest, largest + 1))
    cos, sin = np.round(np.cos(angles), 15), np.round(np.sin(angles), 15)
    matrix = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
    centre = np.array([width / 2, height / 2])
    start = centre - matrix @ centre + matrix @ np.array([0.5, 0.5])
    table = np.concatenate([matrix, start[..., None]], axis=-1)
    return np.floor(65536 * table + 0.5).astype(np.int32)


def rotate_nearest(image: Float[Array, "h w c"], row: Int[Array, "2 3"]) -> Float[Array, "h w c"]:
    """Rotates an image about its centre with nearest-neighbour sampling, 0 outside.

    Args:
      image: (H, W, C), any range.
      row: Entry of `rotation_table`.
    """
    height, width, _ = image.shape
    y, x = _pixel_grid(height, width)[..., 0], _pixel_grid(height, width)[..., 1]
    from_x, from_y = ((row[i, 0] * x + row[i, 1] * y + row[i, 2]) >> 16 for i in range(2))
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    sampled = image[from_y.clip(0, height - 1), from_x.clip(0, width - 1)]
    return jnp.where(inside[..., None], sampled, 0)


def warp(
    image: Float[Array, "h w c"], matrix: Float[Array, "2 2"], shift: Float[Array, " 2"]
) -> Float[Array, "h w c"]:
    """Samples an image at `matrix @ position + shift`, bilinear, 0 outside.

    Flips and the identity sample at pixel centres and return the original values exactly.
    """
    height, width, _ = image.shape
    size = jnp.array([height, width], jnp.float32)
    centred = _pixel_grid(height, width) - (size - 1) / 2
    return sample(image, centred @ matrix.T + shift * size + (size - 1) / 2)


def sample(image: Float[Array, "h w c"], source: Float[Array, "h w 2"]) -> Float[Array, "h w c"]:
    """Samples an image at the (row, column) of each output pixel, bilinear, 0 outside."""
    size = jnp.array(image.shape[:2], jnp.float32)
    # Samples far outside are 0 at any distance; the bound prevents integer overflow.
    source = jnp.clip(source, -2.0, size + 1)
    corner = jnp.floor(source)
    fraction = source - corner
    y, x = corner[..., 0].astype(jnp.int32), corner[..., 1].astype(jnp.int32)
    fy, fx = fraction[..., :1], fraction[..., 1:]
    padded = jnp.pad(image, ((3, 3), (3, 3), (0, 0)))

    def at(dy, dx):
        return padded[y + dy + 3, x + dx + 3]

    top = at(0, 0) * (1 - fx) + at(0, 1) * fx
    bottom = at(1, 0) * (1 - fx) + at(1, 1) * fx
    return top * (1 - fy) + bottom * fy


def published_photometric(
    key: Key[Array, ""], image: Float[Array, "h w 3"]
) -> Float[Array, "h w 3"]:
    """Applies the published augmentation: gamma, noise, brightness, contrast and motion blur.

    Gamma .9-1.1 always; Gaussian noise sd .01 p .5; brightness +-.3 p .5; contrast x.7-1.3 p .5;
    motion blur p .2; clipped to [0, 1] after each.
    """
    keys = jax.random.split(key, 8)
    image = image ** _uniform(keys[0], 0.9, 1.1)
    noise = 0.01 * jax.random.normal(keys[1], image.shape)
    image = _maybe(keys[2], 0.5, image, image + noise)
    image = _maybe(keys[3], 0.5, image, image + _uniform(keys[4], -0.3, 0.3))
    image = _maybe(keys[5], 0.5, image, image * _uniform(keys[6], 0.7, 1.3))
    apply_key, blur_key = jax.random.split(keys[7])
    return _maybe(apply_key, 0.2, image, convolve(image, motion_kernel(blur_key)))


def motion_kernel(key: Key[Array, ""]) -> Float[Array, "5 5"]:
    """Returns a kernel that sums to 1: a 5-pixel line at up to +-20 degrees.

    Its weights are linear along the line, with a slope given by a direction in +-.5.
    """
    angle_key, direction_key = jax.random.split(key)
    angle = jnp.deg2rad(_uniform(angle_key, -20.0, 20.0))
    direction = (_uniform(direction_key, -0.5, 0.5) + 1) / 2
    line = jnp.linspace(1 - direction, direction, BLUR_TAPS)
    kernel = jnp.zeros((BLUR_TAPS, BLUR_TAPS)).at[BLUR_TAPS // 2].set(line)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    matrix = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
    kernel = warp(kernel[..., None], matrix, jnp.zeros(2))[..., 0]
    return kernel / kernel.sum()


def convolve(image: Float[Array, "h w c"], kernel: Float[Array, "k k"]) -> Float[Array, "h w c"]:
    """Convolves each channel with a small kernel; edge pixels are repeated at the border."""
    height, width, _ = image.shape
    taps = kernel.shape[0]
    padded = jnp.pad(image, ((taps // 2,) * 2, (taps // 2,) * 2, (0, 0)), mode="edge")
    shifted = [
        kernel[i, j] * padded[i : i + height, j : j + width]
        for i in range(taps)
        for j in range(taps)
    ]
    return jnp.stack(shifted).sum(0)


def _adjust(contrast_key, brightness_key, image, contrast, brightness):
    if contrast:
        factor = 1 + _uniform(contrast_key, -contrast, contrast)
        image = image.mean() + factor * (image - image.mean())
    if brightness:
        image = image + _uniform(brightness_key, -brightness, brightness)
    return image


def _uniform(key, low, high):
    return jax.random.uniform(key, minval=low, maxval=high)


def _maybe(key, probability, image, changed):
    apply = jax.random.bernoulli(key, probability)
    return jnp.where(apply, jnp.clip(changed, 0.0, 1.0), image)


def _pixel_grid(height, width):
    return jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1)


def _unstack(stack, maps):
    edges = list(itertools.accumulate(x.shape[-1] for x in maps))
    return jnp.split(stack, edges[:-1], axis=-1)
