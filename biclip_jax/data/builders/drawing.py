"""Draws chest-like images with lesions and prompts that name some of them, with numpy."""

from __future__ import annotations

import numpy as np

SIDES = ("left", "right")
LEVELS = ("upper", "middle", "lower")
COUNTS = {1: "one infected area", 2: "two infected areas"}

# Distance of the lungs' midlines from the image's, and their half axes, in image widths.
LUNG_OFFSET = 0.22
LUNG_HALF_WIDTH = 0.19
LUNG_HALF_HEIGHT = 0.38
LESION_RADIUS = (0.07, 0.1)


def draw_example(seed: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Draws an image, the mask of its target lesions, and the prompt that names them.

    Three or four lesions are in different zones. The one or two targets are chosen after the
    lesions are drawn, so that only the prompt identifies them. Left is the left half of the image.
    The anatomy of (seed, index) is the same at every size.

    Args:
      seed: Seed of the split.
      index: Row in the split.
      size: Side of the image in pixels.

    Returns:
      image (size, size, 1) uint8, mask (size, size, 1) uint8 in {0, 1}, and the prompt.
    """
    image, lesions, zones, is_target = draw_lesions(seed, index, size)
    return image, lesions[is_target].any(0).astype(np.uint8)[..., None], describe(zones[is_target])


def draw_lesions(
    seed: int, index: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws an image and all of its L = 3 or 4 lesions.

    Returns:
      image (size, size, 1) uint8, lesions (L, size, size) bool, zones (L,) int as
      3 * side + level, and is_target (L,) bool.
    """
    rng = np.random.default_rng((seed, index))
    scale, tilt = rng.uniform(0.94, 1.06), rng.uniform(-0.04, 0.04)
    shift_x, shift_y = rng.uniform(-0.02, 0.02, 2)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    # x points right and y down, from the centre of the chest, in image widths.
    x = (axis[None, :] - shift_x - tilt * axis[:, None]) / scale
    y = (axis[:, None] - shift_y) / scale + 0 * x
    lungs = np.maximum(_lung(x, y, -1), _lung(x, y, 1))
    chest = _chest(rng, x, y, lungs)
    coverage, zones = _lesions(rng, x, y)
    is_target = np.zeros(len(zones), bool)
    is_target[: 1 + (rng.random() < 0.4)] = True
    is_target = rng.permutation(is_target)
    brightness = chest + (coverage * rng.uniform(0.3, 0.4, (len(zones), 1, 1))).sum(0)
    brightness = brightness * rng.uniform(0.88, 1.12) + rng.normal(0, 0.022, x.shape)
    image = (np.clip(brightness, 0, 1) * 255).astype(np.uint8)[..., None]
    return image, coverage >= 0.5, zones, is_target


def describe(zones: np.ndarray) -> str:
    """Describes 1 or 2 zones (N,) int, 3 * side + level, in the wording of QaTa-COV19."""
    zones = np.sort(zones)
    locations = []
    for side, name in enumerate(SIDES):
        levels = [LEVELS[zone % 3] for zone in zones if zone // 3 == side]
        if levels:
            locations.append(f"{' '.join(levels)} {name} lung")
    extent = "bilateral" if len(locations) == 2 else "unilateral"
    return f"{extent} pulmonary infection, {COUNTS[len(zones)]}, {' and '.join(locations)}."


def _chest(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """Returns the image (S, S) without lesions, from 0 black to 1 white."""
    shoulders = 0.5 - 0.16 * _step(-0.34 - y, 0.05)
    body = _step(shoulders - np.abs(x) - 0.25 * np.maximum(y - 0.3, 0) ** 2, 0.02)
    spine = np.exp(-((x / 0.055) ** 2))
    heart = np.exp(-(((x - 0.05) / 0.085) ** 2) - ((y - 0.14) / 0.14) ** 2)
    ribs = np.cos(2 * np.pi * (rng.uniform(7, 9) * (y + 0.9 * x**2) + rng.random()))
    tissue = 0.5 + 0.2 * spine + 0.08 * heart + 0.05 * _texture(rng, x.shape[0])
    air = 0.17 + 0.05 * heart + 0.03 * ribs + 0.04 * _texture(rng, x.shape[0])
    return (tissue * (1 - lungs) + air * lungs) * (0.08 + 0.92 * body)


def _lung(x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    """Returns one lung field (S, S), 1 inside, 0 outside, narrow at the top; side is -1 or 1."""
    outward = side * x - LUNG_OFFSET + 0.09 * np.maximum(-y, 0)
    width = LUNG_HALF_WIDTH - 0.12 * np.maximum(-y, 0)
    # The diaphragm rises towards the middle of the chest.
    floor = LUNG_HALF_HEIGHT - 0.09 * np.maximum(-outward, 0) / LUNG_HALF_WIDTH
    height = np.where(y > 0, floor, LUNG_HALF_HEIGHT)
    radius = (np.abs(outward / width) ** 3 + np.abs(y / height) ** 3) ** (1 / 3)
    return _step(1 - radius, 0.06)


def _lesions(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns coverages (L, S, S), 0.5 on a smooth, irregular outline, and zones (L,)."""
    num = 3 + int(rng.random() < 0.6)
    zones = rng.permutation(6)[:num]
    side, level = 2 * (zones // 3) - 1, zones % 3 - 1
    jitter = rng.uniform(-1, 1, (2, num))
    centre_y = 0.22 * level + 0.015 * jitter[0]
    inward = 0.025 * (level < 0)
    centre_x = side * (LUNG_OFFSET - inward) + 0.025 * jitter[1]
    dx, dy = (x - centre_x[:, None, None]), (y - centre_y[:, None, None])
    distance, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
    radius = rng.uniform(*LESION_RADIUS, num)[:, None, None] * np.ones_like(angle)
    for frequency, max_amplitude in ((2, 0.16), (3, 0.1), (5, 0.05)):
        amplitude, phase = rng.uniform(0, max_amplitude, num), rng.uniform(0, 2 * np.pi, num)
        radius *= 1 + amplitude[:, None, None] * np.cos(frequency * angle + phase[:, None, None])
    return _step(radius - distance, 0.008), zones


def _step(value: np.ndarray, softness: float) -> np.ndarray:
    """Smooth step: 0 below, 1 above, 0.5 at zero; `softness` is the width of the transition."""
    return 0.5 + 0.5 * np.tanh(value / (2 * softness))


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns smooth noise (S, S), unit variance at its 9 x 9 knots, the same at every size."""
    knots = rng.normal(size=(9, 9))
    positions = (np.arange(size) + 0.5) / size * 8
    weights = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(9)))
    return weights @ knots @ weights.T
