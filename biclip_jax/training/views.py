"""Weak and strong views, on the device: pure functions of a key and one example.

Column `published` of docs/method.md: one geometry moves picture, pseudo-image
and mask together; the strong view then changes the picture's light. Pictures
are float32 (H, W, C) in [0, 1]; batches come by `jax.vmap` with one key an
example, so that any number of devices sees the same pictures.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

BLUR_TAPS = 5


class Geometry(NamedTuple):
    """Probabilities and ranges of the joint geometry; angles in degrees, shifts in widths."""

    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    affine: float = 0.7
    rotation: float = 20.0
    translation: float = 0.1
    scale_low: float = 0.8
    scale_high: float = 1.2


class Views(NamedTuple):
    """Weak picture, strong picture, pseudo-image, mask after one joint geometry."""

    weak_image: Float[Array, "h w 3"]
    strong_image: Float[Array, "h w 3"]
    pseudo_image: Float[Array, "h w 3"]
    mask: Float[Array, "h w 1"]


def weak_and_strong(
    key: Key[Array, ""],
    image: Float[Array, "h w 3"],
    pseudo_image: Float[Array, "h w 3"],
    mask: Float[Array, "h w 1"],
    geometry: Geometry,
) -> Views:
    """Both views of one example."""
    geometry_key, light_key = jax.random.split(key)
    matrix, shift = random_geometry(geometry_key, geometry)
    stack = jnp.concatenate([image, pseudo_image], axis=-1)
    stack = warp(stack, matrix, shift)
    image, pseudo_image = stack[..., :3], stack[..., 3:]
    mask = jnp.round(warp(mask, matrix, shift))
    return Views(image, change_light(light_key, image), pseudo_image, mask)


def random_geometry(
    key: Key[Array, ""], geometry: Geometry
) -> tuple[Float[Array, "2 2"], Float[Array, " 2"]]:
    """Draws flips and an affine map as one matrix and a shift, from output to input.

    Coordinates are (y, x) from the centre, in units of the picture's width.
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
    flip_x = 1 - 2.0 * jax.random.bernoulli(keys[5], geometry.horizontal_flip)
    return matrix * jnp.stack([flip_y, flip_x])[:, None], jnp.where(affine, shift, 0.0)


def warp(
    image: Float[Array, "h w c"], matrix: Float[Array, "2 2"], shift: Float[Array, " 2"]
) -> Float[Array, "h w c"]:
    """Samples a picture at `matrix @ position + shift`, bilinear, 0 outside.

    Flips and the identity fall on pixel centres and give the pixels' own values.
    """
    height, width, _ = image.shape
    size = jnp.array([height, width], jnp.float32)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1)
    centred = grid - (size - 1) / 2
    source = centred @ matrix.T + shift * size + (size - 1) / 2
    # Far outside is black whatever the distance; the bound keeps integers in range.
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


def change_light(key: Key[Array, ""], image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    """Strong photometric change: gamma, noise, brightness, contrast, motion blur.

    Gamma .9-1.1 always; Gaussian noise sd .01 p .5; brightness +-.3 p .5;
    contrast x.7-1.3 p .5; motion blur p .2; clipped to [0, 1] after each.
    """
    keys = jax.random.split(key, 8)
    image = image ** _uniform(keys[0], 0.9, 1.1)
    noise = 0.01 * jax.random.normal(keys[1], image.shape)
    image = _maybe(keys[2], 0.5, image, image + noise)
    image = _maybe(keys[3], 0.5, image, image + _uniform(keys[4], -0.3, 0.3))
    image = _maybe(keys[5], 0.5, image, image * _uniform(keys[6], 0.7, 1.3))
    choose_key, blur_key = jax.random.split(keys[7])
    return _maybe(choose_key, 0.2, image, convolve(image, motion_kernel(blur_key)))


def motion_kernel(key: Key[Array, ""]) -> Float[Array, "5 5"]:
    """A line of 5 pixels at +-20 degrees whose weights lean by a direction in +-.5; sums to 1."""
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
    """Each channel with one small kernel; the border repeats the edge pixels."""
    height, width, _ = image.shape
    taps = kernel.shape[0]
    padded = jnp.pad(image, ((taps // 2,) * 2, (taps // 2,) * 2, (0, 0)), mode="edge")
    shifted = [
        kernel[i, j] * padded[i : i + height, j : j + width]
        for i in range(taps)
        for j in range(taps)
    ]
    return jnp.stack(shifted).sum(0)


def _uniform(key, low, high):
    return jax.random.uniform(key, minval=low, maxval=high)


def _maybe(key, probability, image, changed):
    chosen = jax.random.bernoulli(key, probability)
    return jnp.where(chosen, jnp.clip(changed, 0.0, 1.0), image)
