"""The train step on paper: its work and bytes, and what published peaks of chips make of them.

    python -m benchmarks.roofline --config qata --config.model.dtype=bfloat16

Nothing runs: the step of the training program is traced, and its products and convolutions are
counted. One JSON line each: the step; the time of one chip; what communication adds on several.
BiCLIP without pretrained towers. The peaks are those of bfloat16; docs/performance.md has the
assumptions.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.biclip import noise_prompts
from benchmarks.flops import equations, flops_of
from biclip_jax.core import config as config_lib
from biclip_jax.core import distributed, rng
from biclip_jax.experiment import program
from biclip_jax.training.state import num_parameters

EFFICIENCY = 0.4  # share of the peak that the products are assumed to reach: the project's goal
BATCHES = (16, 64)  # pictures a chip
ROWS = (4, 8)  # of the two traces; four are enough for pairs and unlabelled pictures


class Chip(NamedTuple):
    """Published peaks: bfloat16 FLOP/s without sparsity, memory in bytes/s and in bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: float


class Network(NamedTuple):
    """What joins chips: seconds of an all-reduce of few bytes, and rings, the inner one first.

    A ring is its number of chips and the bytes/s that each of them sends.
    """

    latency: float = 0.0
    rings: Sequence[tuple[int, float]] = ()


H200 = Chip("H200 SXM", 989e12, 4.8e12, 141e9)
V5E = Chip("TPU v5e", 197e12, 819e9, 16e9)
V5P = Chip("TPU v5p", 459e12, 2765e9, 95e9)
# {chip: {number of chips: network}}. Bandwidths are one way: NVLink's 900 GB/s both ways are 450,
# ICI's 1600 and 4800 Gbit/s are 200 and 600, InfiniBand NDR's 400 are 50. The corners of a slice
# without wrap-around links have half of them: v5e below 16x16, v5p below 4x4x4. Latencies are
# assumed: 15 us in a node of 8 GPUs, 5 more for every doubling of the nodes; on a TPU 1 us a hop,
# there and back: 2x4, 8x8, 16x16 chips of v5e, 2x2x2, 4x4x4, 4x8x8 of v5p.
NETWORKS = {
    H200: {
        8: Network(15e-6, [(8, 450e9)]),
        64: Network(30e-6, [(8, 450e9), (8, 50e9)]),
        256: Network(40e-6, [(8, 450e9), (32, 50e9)]),
    },
    V5E: {
        8: Network(8e-6, [(8, 100e9)]),
        64: Network(28e-6, [(64, 100e9)]),
        256: Network(32e-6, [(256, 200e9)]),
    },
    V5P: {
        8: Network(6e-6, [(8, 300e9)]),
        64: Network(12e-6, [(64, 600e9)]),
        256: Network(20e-6, [(256, 600e9)]),
    },
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="qata")
    args, overrides = parser.parse_known_args()
    for entry in entries(count_step(config_lib.load_config(args.config, overrides))):
        print(json.dumps(entry))


def entries(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All that is printed about a step."""
    alone = [on_one_chip(step, chip, batch) for chip in NETWORKS for batch in BATCHES]
    several = [
        on_several(step, chip, chips, network)
        for chip, networks in NETWORKS.items()
        for chips, network in {1: Network(), **networks}.items()
    ]
    return [step, *alone, *several]


def count(jaxpr: Any) -> Counter[str]:
    """What is in a step: FLOPs and bytes of products and convolutions, and its all-reduces.

    Returns:
      forward_flops, backward_flops; forward_bytes, backward_bytes of their outputs; sync_forward,
      sync_backward, sync_bytes of the all-reduces inside the loss, which nothing can hide;
      reduced_bytes of those after it, gradients and metrics.
    """
    found: Counter[str] = Counter()
    for eqn, times, stack in equations(jaxpr):
        way = "backward" if "transpose(" in stack else "forward"
        if flops := flops_of(eqn):
            found[f"{way}_flops"] += times * flops
            found[f"{way}_bytes"] += times * num_bytes(v.aval for v in eqn.outvars)
        if eqn.primitive.name.startswith("psum"):
            within = "jvp(" in stack
            moved = times * num_bytes(v.aval for v in eqn.invars)
            found["sync_bytes" if within else "reduced_bytes"] += moved
            found[f"sync_{way}"] += times * within
    return found


def num_bytes(arrays: Iterable[Any]) -> int:
    """Of arrays, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in arrays)


def traced(config, rows: int) -> tuple[Any, Any]:
    """(jaxpr of the training program's step, shapes of the state), of `rows` pictures a device."""
    config = config.copy_and_resolve_references()
    config.batch_size = rows * distributed.num_devices() * config.optim.accumulate
    encoded_text, batch = noise_prompts(config)
    built = []

    def initial():
        built.append(program.build(config, config.batch_size, encoded_text))
        return built[0].initial

    # Shapes are enough: parameters are neither drawn nor stored.
    state = jax.eval_shape(initial)
    labelled = np.arange(config.batch_size) < built[0].num_labelled_rows
    batch = distributed.shard_batch({**batch, "labelled": labelled})
    key = rng.stream(config, "augment")
    return jax.make_jaxpr(built[0].train_step)(state, batch, key).jaxpr, state


def count_step(config) -> dict[str, Any]:
    """The first entry: FLOPs and bytes of a step.

    Two traces of different batches tell what grows with the pictures: activations and their
    gradients do; the gradients of parameters do not, they are in `fixed_traffic_bytes`.
    """
    found = []
    for rows in ROWS:
        jaxpr, state = traced(config, rows)
        found.append(count(jaxpr))
    images = (ROWS[1] - ROWS[0]) * config.optim.accumulate
    each = Counter({name: (found[1][name] - found[0][name]) // images for name in found[0]})
    parts = (state.params, state.opt_state, state.ema)
    gradient, optimizer, average = (num_bytes(jax.tree.leaves(part)) for part in parts)
    state_bytes = 2 * gradient + optimizer + average  # the parameters' are the gradient's
    return {
        "entry": "step",
        "config": config.name,
        "image_size": config.model.image_size,
        "width": config.model.width,
        "dtype": config.model.dtype,
        "parameters": num_parameters(state.params),
        "flops_per_picture": each["forward_flops"] + each["backward_flops"],
        "backward_flops_per_picture": each["backward_flops"],
        "gradient_bytes": gradient,
        "optimizer_bytes": optimizer,
        "state_bytes": state_bytes,
        "forward_output_bytes_per_picture": each["forward_bytes"],
        "traffic_bytes_per_picture": 2 * (each["forward_bytes"] + each["backward_bytes"]),
        "fixed_traffic_bytes": 2 * state_bytes,
        **{name: found[0][name] for name in ("sync_forward", "sync_backward", "sync_bytes")},
    }


def on_one_chip(step: Mapping[str, Any], chip: Chip, batch: int) -> dict[str, Any]:
    """Roofline of one chip: milliseconds at the published peaks; intensities in FLOP a byte."""
    flops, traffic = batch * step["flops_per_picture"], traffic_bytes(step, batch)
    compute, memory = flops / chip.flops, traffic / chip.bandwidth
    return {
        "entry": "one_chip",
        "chip": chip.name,
        "batch": batch,
        "compute_ms": _ms(compute),
        "memory_ms": _ms(memory),
        "bound": "compute" if compute > memory else "memory",
        "intensity": round(flops / traffic),
        "ridge": round(chip.flops / chip.bandwidth),
        "step_ms": _ms(step_seconds(step, chip, batch)),
        "pictures_per_second": round(batch / step_seconds(step, chip, batch)),
        "state_share_of_memory": round(step["state_bytes"] / chip.memory, 4),
    }


def step_seconds(step: Mapping[str, Any], chip: Chip, batch: int) -> float:
    """Of one chip: the products at the assumed efficiency, or the memory if that takes longer."""
    compute = batch * step["flops_per_picture"] / (EFFICIENCY * chip.flops)
    return max(compute, traffic_bytes(step, batch) / chip.bandwidth)


def traffic_bytes(step: Mapping[str, Any], batch: int) -> int:
    """Least bytes of a step that go to and from the memory of a chip."""
    return batch * step["traffic_bytes_per_picture"] + step["fixed_traffic_bytes"]


def all_reduce_seconds(held: float, rings: Sequence[tuple[int, float]]) -> float:
    """Of `held` bytes a chip: 2 (n - 1) / n x bytes / bandwidth in a ring of n chips.

    What a ring leaves to each of its chips, an n-th of the bytes, goes round the next one.
    """
    seconds = 0.0
    for size, bandwidth in rings:
        seconds += 2 * (size - 1) / size * held / bandwidth
        held /= size
    return seconds


def on_several(step: Mapping[str, Any], chip: Chip, chips: int, network: Network) -> dict[str, Any]:
    """What communication costs: milliseconds, and the share of the ideal speed that is left.

    With overlap the gradients travel during the backward pass, without it after it; from
    `hiding_batch` pictures a chip the backward pass takes as long. The all-reduces of
    BatchNorm's statistics stop the step in both.
    """
    reduce = all_reduce_seconds(step["gradient_bytes"], network.rings)
    sync = (step["sync_forward"] + step["sync_backward"]) * network.latency
    backward = step["backward_flops_per_picture"] / (EFFICIENCY * chip.flops)
    entry = {
        "entry": "scaling",
        "chip": chip.name,
        "chips": chips,
        "all_reduce_ms": _ms(reduce),
        "sync_ms": _ms(sync),
        "hiding_batch": max(1, math.ceil(reduce / backward)),
    }
    for batch in BATCHES:
        alone = step_seconds(step, chip, batch)
        late = max(0.0, reduce - batch * backward)
        entry[f"overlap_{batch}"] = round(alone / (alone + sync + late), 4)
        entry[f"no_overlap_{batch}"] = round(alone / (alone + sync + reduce), 4)
    return entry


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


if __name__ == "__main__":
    main()
