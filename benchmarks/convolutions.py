"""Time of both gradients of a 3x3 convolution, of lax and of `layers.convolve3x3`, by shape.

    python -m benchmarks.convolutions --batch 1 4 16

Prints one JSON line per shape of the U-Net: milliseconds of both, interleaved, warm, median;
GFLOP/s; and the speed of ours relative to lax. Needs only jax.
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
    """Times both gradients of both implementations for one shape."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)

    def noise(*shape: int) -> Any:
        return jax.numpy.asarray(rng.standard_normal(shape), np.float32)

    x, kernel = noise(batch, side, side, channels), noise(3, 3, channels, features)
    cotangent = noise(batch, side, side, features)
    gflop = 2 * 9 * channels * features * cotangent[..., 0].size / 1e9
    line = {"batch": batch, "side": side, "channels": channels, "features": features}
    for name, index in (("map", 0), ("kernel", 1)):
        gradients = {name: gradient(f, index) for name, f in convolutions().items()}
        ms = interleave(
            {key: (lambda f=f: f(x, kernel, cotangent)) for key, f in gradients.items()},
            repetitions,
        )
        line |= {f"{name}_gradient_ms": {key: round(t, 2) for key, t in ms.items()}}
        line |= {f"{name}_gflop_per_s": {key: round(1e3 * gflop / t) for key, t in ms.items()}}
        line |= {f"{name}_speed_over_lax": round(ms["lax"] / ms["ours"], 2)}
    return line


def convolutions() -> dict[str, Callable]:
    """Returns {implementation: convolution}."""
    import jax

    from biclip_jax.models import layers

    dimensions = ("NHWC", "HWIO", "NHWC")

    def lax(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)

    return {"lax": lax, "ours": layers.convolve3x3}


def gradient(convolve: Callable, index: int) -> Callable:
    """Returns (x, kernel, cotangent) -> the gradient of the map (0) or the kernel (1)."""
    import jax

    return jax.jit(lambda x, kernel, ct: jax.vjp(convolve, x, kernel)[1](ct)[index])


def interleave(functions: dict[str, Callable], repetitions: int) -> dict[str, float]:
    """Returns {name: median milliseconds}, after one call of each that is not measured."""
    import jax

    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions + 1):
        for name, call in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


if __name__ == "__main__":
    main()
