"""MedCLIPSeg, ours and a PyTorch twin's in turn in one run.

    python -m benchmarks.medclipseg --variants clip --works pass train

One pass with fresh noise, one train step (losses as the reference computes them, Adam on what is
not frozen), 30 samples; 224 px, random weights. Each implementation runs each case in processes of
its own, one after the other, several rounds of both. One JSON line a case: the median of all warm
repetitions, the time until the first was done (compilation included), resident memory after the
model was built and at its peak, the ratios, and the machine's load before each process began: take
the figures on a machine that does nothing else. `--published` has the twin do the work of the
published program whose outcome is not used, too. Needs the extra `parity`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from biclip_jax import cli

VARIANTS = ("clip", "unimedclip")
BATCHES = {"pass": (1, 4), "train": (1, 4), "samples": (1,)}
LENGTHS = {"clip": 77, "unimedclip": 256}
NUM_TOKENS, SIZE = 20, 224
NUM_SAMPLES, CHUNK = 30, 10
LEARNING_RATE = 3e-4


class Inputs(NamedTuple):
    """Pictures (B, 224, 224, 3) in [0, 1], masks (B, 224, 224) in {0, 1}, ids (B, L)."""

    image: np.ndarray
    mask: np.ndarray
    ids: np.ndarray


def main() -> None:
    """Runs both in turn, or one case of one of them where a child process is told so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--works", nargs="+", choices=tuple(BATCHES), default=tuple(BATCHES))
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 4))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repetitions", type=int, default=5, help="warm ones a round; 1 of samples"
    )
    parser.add_argument("--published", action="store_true", help="the twin wastes work, too")
    parser.add_argument("--only", choices=("jax", "torch"), help="this one, in this process")
    args = parser.parse_args()
    cases = [
        (variant, work, batch)
        for variant in args.variants
        for work in args.works
        for batch in BATCHES[work]
        if batch in args.batches
    ]
    if args.only:
        repetitions = 1 if cases[0][1] == "samples" else args.repetitions
        print(json.dumps(measure(args.only, *cases[0], repetitions, args.published)))
        return
    flags = ["--repetitions", str(args.repetitions), *["--published"] * args.published]
    for variant, work, batch in cases:
        found: dict[str, list] = {"jax": [], "torch": []}
        case = ["--variants", variant, "--works", work, "--batches", str(batch)]
        for _ in range(args.rounds):
            for name, rounds in found.items():
                command = [sys.executable, "-m", "benchmarks.medclipseg", "--only", name]
                command += [*case, *flags]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rounds.append(json.loads(done.stdout.splitlines()[-1]))
        entry = {"variant": variant, "work": work, "batch": batch, "published": args.published}
        print(json.dumps(entry | compare(found)), flush=True)


def compare(found: dict[str, list]) -> dict:
    """Medians over the rounds of one case, and the ratios."""
    entry: dict = {}
    for name, rounds in found.items():
        warm = [1000 * s for round_ in rounds for s in round_["warm_s"]]
        entry[f"{name}_ms"] = round(statistics.median(warm), 1)
        entry[f"{name}_ms_range"] = [round(min(warm), 1), round(max(warm), 1)]
        first = statistics.median(round_["first_s"] for round_ in rounds)
        entry[f"{name}_first_s"] = round(first, 2)
        for field in ("built_mib", "peak_mib"):
            entry[f"{name}_{field}"] = max(round_[field] for round_ in rounds)
        entry[f"{name}_load"] = [round_["load"] for round_ in rounds]
    entry["speed_jax_over_torch"] = round(entry["torch_ms"] / entry["jax_ms"], 2)
    entry["memory_jax_over_torch"] = round(entry["jax_peak_mib"] / entry["torch_peak_mib"], 2)
    return entry


def measure(
    name: str, variant: str, work: str, batch: int, repetitions: int, published: bool
) -> dict:
    """One case: seconds of the first and of the warm repetitions, memory."""
    load = round(os.getloadavg()[0], 2)
    given = inputs(variant, batch)
    if name == "jax":
        cli.set_xla_flags()
        cli.keep_memory()
        works = {"pass": pass_ours, "train": train_step_ours, "samples": samples_ours}
        repeat = works[work](variant, given)
    else:
        repeat = torch_work(variant, work, given, published)
    built_mib = resident_mib()
    seconds = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        repeat()
        seconds.append(time.perf_counter() - start)
    return {
        "first_s": seconds[0],
        "warm_s": seconds[1:],
        "load": load,
        "built_mib": built_mib,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def resident_mib() -> int:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def inputs(variant: str, batch: int) -> Inputs:
    """Noise; sentences of 20 tokens, padded, which end in their largest id."""
    rng = np.random.default_rng(0)
    image = rng.random((batch, SIZE, SIZE, 3), dtype=np.float32)
    mask = (image[..., 0] > 0.8).astype(np.float32)
    ids = np.zeros((batch, LENGTHS[variant]), np.int32)
    ids[:, :NUM_TOKENS] = rng.integers(5, 30000, (batch, NUM_TOKENS))
    ids[:, NUM_TOKENS - 1] = 30001
    return Inputs(image, mask, ids)


def build_ours(variant: str):
    """The model of the published sizes and fresh variables."""
    import jax

    from biclip_jax.models import medclipseg

    config = {
        **medclipseg.TOWERS[variant],
        "adapter_width": 256,
        "beta": medclipseg.BETA,
        "gate_init": 0.0,
        "num_layers": 10,
        "num_upscales": 2,
        "value_only": variant in medclipseg.VALUE_ONLY,
        "input": "imagenet_bgr",
        "num_samples": NUM_SAMPLES,
        "dtype": "float32",
    }
    model = medclipseg.build(config)
    return model, medclipseg.init(model, jax.random.key(0), LENGTHS[variant])


def pass_ours(variant: str, given: Inputs) -> Callable[[], object]:
    """One call is one pass with noise of its own."""
    import jax

    model, variables = build_ours(variant)
    image, ids = jax.device_put((given.image, given.ids))
    key = jax.random.key(1)

    @jax.jit
    def forward(variables, image, ids, keys):
        return model.apply(variables, image, ids, ids > 0, noise=keys)[0]

    def repeat():
        nonlocal key
        keys = jax.random.split(key, 1 + len(image))
        key = keys[0]
        return jax.block_until_ready(forward(variables, image, ids, keys[1:]))

    return repeat


def samples_ours(variant: str, given: Inputs) -> Callable[[], object]:
    """One call is the mean of 30 samples."""
    import jax

    from biclip_jax.models import medclipseg

    model, variables = build_ours(variant)
    image, ids = jax.device_put((given.image, given.ids))
    keys = jax.random.split(jax.random.key(1), len(image))

    @jax.jit
    def sample(variables, image, ids, keys):
        return medclipseg.sample_statistics(
            model, variables, image, ids, ids > 0, keys, num_samples=NUM_SAMPLES, chunk=CHUNK
        ).mean

    return lambda: jax.block_until_ready(sample(variables, image, ids, keys))


def train_step_ours(variant: str, given: Inputs) -> Callable[[], object]:
    """One call is one train step with noise of its own, done when it returns.

    0.5 Dice of rows + 0.5 binary cross-entropy + 0.1 contrastive loss as released, no dropout,
    Adam of rate `LEARNING_RATE` on the adapters and the head; no gradient into the towers. Before
    it returns, the model and the optimiser's state are built; the first call compiles.
    """
    import jax
    import optax

    from biclip_jax.models import medclipseg
    from biclip_jax.training import objective_medclipseg as objective
    from biclip_jax.training import state, steps, views

    model, variables = build_ours(variant)
    recipe = objective.Recipe(
        weights={"dice": 0.5, "bce": 0.5, "contrastive": 0.1},
        dice="rows",
        contrastive="released",
        geometry=views.Geometry(horizontal_flip=0.0, vertical_flip=0.0, affine=0.0),
    )
    optimizer = optax.adam(LEARNING_RATE)
    current = state.create(variables, optimizer, medclipseg.FROZEN)
    ids = given.ids
    text = {"text_ids": ids, "text_mask": ids > 0, "has_text": ids[:, 0] > 0}
    batch = {
        "image": np.rint(255 * given.image).astype(np.uint8),
        "mask": given.mask[..., None].astype(np.uint8),
        "row": np.arange(len(ids), dtype=np.int32),
        **text,
        **{f"mirrored_{name}": value for name, value in text.items()},
    }
    batch = jax.device_put(batch)
    step = jax.jit(
        partial(
            steps.train_step,
            objective=partial(objective.objective, model=model, recipe=recipe),
            optimizer=optimizer,
        ),
        donate_argnums=0,
    )

    def repeat():
        nonlocal current
        current, metrics = step(current, batch, jax.random.key(1))
        return jax.block_until_ready(metrics)

    return repeat


def torch_work(variant: str, work: str, given: Inputs, published: bool) -> Callable[[], object]:
    """One call is one repetition of the twin, eager, on as many threads as there are cores."""
    import torch

    from tests import torch_clip, torch_medclipseg

    model = torch_medclipseg.MedCLIPSeg(variant, as_published=published)
    model = torch_clip.randomize_(model, 0)
    image = torch.from_numpy(given.image).permute(0, 3, 1, 2).contiguous()
    mask, ids = torch.from_numpy(given.mask), torch.from_numpy(given.ids).long()
    generator = torch.Generator().manual_seed(1)
    learned = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=LEARNING_RATE)

    def forward():
        with torch.inference_mode():
            return model(image, ids, model.draw_noise(ids, generator))

    def samples():
        return torch_medclipseg.monte_carlo(model, image, ids, NUM_SAMPLES, generator)

    def train_step():
        optimizer.zero_grad(set_to_none=True)
        noise = model.draw_noise(ids, generator)
        logits, features, text = model(image, ids, noise, return_features=True)
        torch_medclipseg.total(logits, mask, features, text).backward()
        optimizer.step()

    return {"pass": forward, "train": train_step, "samples": samples}[work]


if __name__ == "__main__":
    main()
