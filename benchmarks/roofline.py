"""Roofline estimate of the train step: its FLOPs and bytes against published peaks of chips.

    python -m benchmarks.roofline --config qata --config.model.dtype=bfloat16

Nothing is executed: the train step is traced, and its products and convolutions are counted. Prints
one JSON line for the step, for the time on one chip, and for the communication on several chips.
Only for BiCLIP without pretrained encoders. The peaks are those of bfloat16; docs/performance.md
has the assumptions.
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
from biclip_jax.core import config as config_lib
from biclip_jax.core import distributed, rng
from biclip_jax.experiment import program
from biclip_jax.training.state import num_parameters
from reference.flops import equations, flops_of

EFFICIENCY = 0.4  # assumed share of the peak that products reach
BATCHES = (16, 64)  # images per chip
ROWS = (4, 8)  # batch sizes of the two traces; four suffice for pairs and unlabelled images


class Chip(NamedTuple):
    """Published peaks: bfloat16 FLOP/s without sparsity, memory in bytes/s and in bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: float


class Network(NamedTuple):
    """Interconnect: seconds of a small all-reduce, and rings, the inner one first.

    A ring is (number of chips, bytes/s sent by each chip).
    """

    latency: float = 0.0
    rings: Sequence[tuple[int, float]] = ()


H200 = Chip("H200 SXM", 989e12, 4.8e12, 141e9)
V5E = Chip("TPU v5e", 197e12, 819e9, 16e9)
V5P = Chip("TPU v5p", 459e12, 2765e9, 95e9)
# {chip: {number of chips: network}}. Bandwidths are one way: 450 GB/s for NVLink (900 GB/s both
# ways), 200 and 600 GB/s for ICI (1600 and 4800 Gbit/s), 50 GB/s for InfiniBand NDR (400 Gbit/s).
# Slices without wrap-around links have half of it: v5e below 16x16, v5p below 4x4x4. Latencies are
# assumed: 15 us in a node of 8 GPUs, 5 us more for every doubling of the nodes; on TPUs 1 us per
# hop, both ways: 2x4, 8x8, 16x16 chips of v5e, 2x2x2, 4x4x4, 4x8x8 of v5p.
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
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="qata")
    args, overrides = parser.parse_known_args()
    for entry in entries(count_step(config_lib.load_config(args.config, overrides))):
        print(json.dumps(entry))


def entries(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns all printed entries."""
    single = [on_one_chip(step, chip, batch) for chip in NETWORKS for batch in BATCHES]
    several = [
        on_several(step, chip, chips, network)
        for chip, networks in NETWORKS.items()
        for chips, network in {1: Network(), **networks}.items()
    ]
    return [step, *single, *several]


def count(jaxpr: Any) -> Counter[str]:
    """Counts FLOPs and bytes of products and convolutions, and all-reduces of a step.

    Returns:
      forward_flops, backward_flops; forward_bytes, backward_bytes of their outputs; sync_forward,
      sync_backward, sync_bytes of the all-reduces inside the loss, which cannot be overlapped;
      reduced_bytes of the all-reduces after it, of gradients and metrics.
    """
    counts: Counter[str] = Counter()
    for eqn, times, stack in equations(jaxpr):
        direction = "backward" if "transpose(" in stack else "forward"
        if flops := flops_of(eqn):
            counts[f"{direction}_flops"] += times * flops
            counts[f"{direction}_bytes"] += times * num_bytes(v.aval for v in eqn.outvars)
        if eqn.primitive.name.startswith("psum"):
            in_loss = "jvp(" in stack
            moved = times * num_bytes(v.aval for v in eqn.invars)
            counts["sync_bytes" if in_loss else "reduced_bytes"] += moved
            counts[f"sync_{direction}"] += times * in_loss
    return counts


def num_bytes(arrays: Iterable[Any]) -> int:
    """Returns the bytes of arrays, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in arrays)


def traced(config, rows: int) -> tuple[Any, Any]:
    """Returns the jaxpr of the train step and the shapes of the state; `rows` images per device."""
    config = config.copy_and_resolve_references()
    config.batch_size = rows * distributed.num_devices() * config.optim.accumulate
    encoded_text, batch = noise_prompts(config)
    built = []

    def initial():
        built.append(program.build(config, config.batch_size, encoded_text))
        return built[0].initial

    # Shapes are enough: parameters are neither initialized nor stored.
    state = jax.eval_shape(initial)
    labelled = np.arange(config.batch_size) < built[0].num_labelled_rows
    batch = distributed.shard_batch({**batch, "labelled": labelled})
    key = rng.stream(config, "augment")
    return jax.make_jaxpr(built[0].train_step)(state, batch, key).jaxpr, state


def count_step(config) -> dict[str, Any]:
    """Returns the first entry: FLOPs and bytes of a step.

    Two traces with different batch sizes separate what grows with the batch (activations and their
    gradients) from what does not (gradients of parameters, in `fixed_traffic_bytes`).
    """
    counts = []
    for rows in ROWS:
        jaxpr, state = traced(config, rows)
        counts.append(count(jaxpr))
    images = (ROWS[1] - ROWS[0]) * config.optim.accumulate
    each = Counter({name: (counts[1][name] - counts[0][name]) // images for name in counts[0]})
    parts = (state.params, state.opt_state, state.ema)
    gradient, optimizer, average = (num_bytes(jax.tree.leaves(part)) for part in parts)
    state_bytes = 2 * gradient + optimizer + average  # parameters and gradients have equal size
    return {
        "entry": "step",
        "config": config.name,
        "image_size": config.model.image_size,
        "width": config.model.width,
        "dtype": config.model.dtype,
        "parameters": num_parameters(state.params),
        "flops_per_image": each["forward_flops"] + each["backward_flops"],
        "backward_flops_per_image": each["backward_flops"],
        "gradient_bytes": gradient,
        "optimizer_bytes": optimizer,
        "state_bytes": state_bytes,
        "forward_output_bytes_per_image": each["forward_bytes"],
        "traffic_bytes_per_image": 2 * (each["forward_bytes"] + each["backward_bytes"]),
        "fixed_traffic_bytes": 2 * state_bytes,
        **{name: counts[0][name] for name in ("sync_forward", "sync_backward", "sync_bytes")},
    }


def on_one_chip(step: Mapping[str, Any], chip: Chip, batch: int) -> dict[str, Any]:
    """Returns the roofline of one chip: milliseconds at the published peaks, FLOP per byte."""
    flops, traffic = batch * step["flops_per_image"], traffic_bytes(step, batch)
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
        "images_per_second": round(batch / step_seconds(step, chip, batch)),
        "state_share_of_memory": round(step["state_bytes"] / chip.memory, 4),
    }


def step_seconds(step: Mapping[str, Any], chip: Chip, batch: int) -> float:
    """Returns the larger of the compute time at the assumed efficiency and the memory time."""
    compute = batch * step["flops_per_image"] / (EFFICIENCY * chip.flops)
    return max(compute, traffic_bytes(step, batch) / chip.bandwidth)


def traffic_bytes(step: Mapping[str, Any], batch: int) -> int:
    """Returns a lower bound of the memory traffic of a step, in bytes."""
    return batch * step["traffic_bytes_per_image"] + step["fixed_traffic_bytes"]


def all_reduce_seconds(num_bytes: float, rings: Sequence[tuple[int, float]]) -> float:
    """Returns the time of an all-reduce: 2 (n - 1) / n x bytes / bandwidth in a ring of n chips.

    The 1 / n of the bytes that each chip then holds is reduced in the next ring.
    """
    seconds = 0.0
    for size, bandwidth in rings:
        seconds += 2 * (size - 1) / size * num_bytes / bandwidth
        num_bytes /= size
    return seconds


def on_several(step: Mapping[str, Any], chip: Chip, chips: int, network: Network) -> dict[str, Any]:
    """Returns the communication time in milliseconds and the scaling efficiency.

    With overlap, gradients are reduced during the backward pass, otherwise after it. From
    `hiding_batch` images per chip the backward pass is long enough to hide it. The all-reduces of
    BatchNorm statistics block the step in both cases.
    """
    reduce = all_reduce_seconds(step["gradient_bytes"], network.rings)
    sync = (step["sync_forward"] + step["sync_backward"]) * network.latency
    backward = step["backward_flops_per_image"] / (EFFICIENCY * chip.flops)
    entry = {
        "entry": "scaling",
        "chip": chip.name,
        "chips": chips,
        "all_reduce_ms": _ms(reduce),
        "sync_ms": _ms(sync),
        "hiding_batch": max(1, math.ceil(reduce / backward)),
    }
    for batch in BATCHES:
        compute = step_seconds(step, chip, batch)
        exposed = max(0.0, reduce - batch * backward)
        entry[f"overlap_{batch}"] = round(compute / (compute + sync + exposed), 4)
        entry[f"no_overlap_{batch}"] = round(compute / (compute + sync + reduce), 4)
    return entry


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


if __name__ == "__main__":
    main()
