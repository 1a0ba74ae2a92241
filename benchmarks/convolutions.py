"""Time of the two gradients of a 3x3 convolution: lax's own and `layers.convolve3x3`'s, by shape.

    python -m benchmarks.convolutions --batch 1 4 16

One JSON line a shape of the U-Net's: milliseconds of both, in turn, warm, median; GFLOP a second;
and the speed of ours over lax's. Needs nothing but jax.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from biclip_jax.core import runtime

# (side, channels in, channels out) of the published U-Net at 224 px.
SHAPES = [
    (224, 64, 64),
    (224, 128, 64),
    (112, 64, 128),
    (112, 128, 128),
    (56, 256, 256),
    (28, 512, 512),
    (14, 512, 1024),
    (14, 1024, 1024),
]


def main() -> None:
    """Times every shape at every batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    runtime.set_xla_flags()
    runtime.keep_freed_memory()
    for batch in args.batch:
        for shape in SHAPES:
            print(json.dumps(measure(batch, *shape, args.repetitions)), flush=True)


def measure(batch: int, side: int, channels: int, features: int, repetitions: int) -> dict:
    """One shape: both gradients by both ways."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)

    def noise(*shape: int) -> Any:
        return jax.numpy.asarray(rng.standard_normal(shape), np.float32)

    x, kernel = noise(batch, side, side, channels), noise(3, 3, channels, features)
    given = noise(batch, side, side, features)
    gflop = 2 * 9 * channels * features * given[..., 0].size / 1e9
    line = {"batch": batch, "side": side, "channels": channels, "features": features}
    for name, index in (("map", 0), ("kernel", 1)):
        ways = {way: gradient(convolve, index) for way, convolve in convolutions().items()}
        ms = in_turn(
            {way: (lambda f=f: f(x, kernel, given)) for way, f in ways.items()}, repetitions
        )
        line |= {f"{name}_gradient_ms": {way: round(t, 2) for way, t in ms.items()}}
        line |= {f"{name}_gflop_per_s": {way: round(1e3 * gflop / t) for way, t in ms.items()}}
        line |= {f"{name}_speed_over_lax": round(ms["lax"] / ms["ours"], 2)}
    return line


def convolutions() -> dict[str, Callable]:
    """{way: convolution}."""
    import jax

    from biclip_jax.models import layers

    dimensions = ("NHWC", "HWIO", "NHWC")

    def lax(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)

    return {"lax": lax, "ours": layers.convolve3x3}


def gradient(convolve: Callable, index: int) -> Callable:
    """(x, kernel, given) -> the gradient of the map (0) or the kernel (1)."""
    import jax

    return jax.jit(lambda x, kernel, given: jax.vjp(convolve, x, kernel)[1](given)[index])


def in_turn(ways: dict[str, Callable], repetitions: int) -> dict[str, float]:
    """{way: median milliseconds}, after one call of each that is not counted."""
    import jax

    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repetitions + 1):
        for way, call in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            found[way].append(1e3 * (time.perf_counter() - start))
    return {way: statistics.median(times[1:]) for way, times in found.items()}


if __name__ == "__main__":
    main()
