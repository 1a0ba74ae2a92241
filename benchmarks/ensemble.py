"""Time of a train step of K models: K calls, or one program (unrolled, lax.map, vmap).

    python -m benchmarks.ensemble --config qata:small,published --members 3 --steps 5

All get the same noise, interleaved in one process, warm, median. Prints one JSON line each: seconds
of one step of all K models and of the first step; then a line with the ratios to K single steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from biclip_jax.core import config as config_lib
from biclip_jax.core import rng, runtime


def main() -> None:
    """Builds all variants and times them interleaved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="qata:small")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="warm steps")
    parser.add_argument("--only", default="single,unrolled,loop,vmap", metavar="A,B")
    args, overrides = parser.parse_known_args()
    runtime.set_xla_flags()
    config = config_lib.load_config(args.config, [*overrides, f"--config.ensemble={args.members}"])
    variants = {name: step for name, step in build(config).items() if name in args.only.split(",")}
    first = {name: seconds_of(step) for name, step in variants.items()}
    warm: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.steps):
        for name, step in variants.items():
            warm[name].append(seconds_of(step))
    median = {name: statistics.median(seconds) for name, seconds in warm.items()}
    for name in variants:
        line = {"name": name, "config": config.name, "members": args.members}
        print(json.dumps({**line, "first_step_s": first[name], "step_s": median[name]}))
    if "single" in median:
        ratios = {f"speed_{name}_over_single": median["single"] / median[name] for name in variants}
        print(json.dumps(ratios))


def seconds_of(step: Callable[[], Any]) -> float:
    """Returns the seconds of one call."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(step())
    return time.perf_counter() - start


def build(config: Any) -> dict[str, Callable[[], Any]]:
    """Returns {name: one step of all members}, all with the same initial state."""
    import jax
    import numpy as np

    from benchmarks.biclip import noise_prompts
    from biclip_jax.experiment import biclip_spec
    from biclip_jax.training import optim, state, steps
    from biclip_jax.training.objectives import biclip as objective

    encoded_text, batch = noise_prompts(config)
    model, variables = biclip_spec.build_model(config, encoded_text, None, None)
    optimizer = optim.make_optimizer(config.optim.to_dict(), config.optim.learning_rate)
    recipe = objective.make_recipe(config.to_dict())
    step = partial(
        steps.train_step,
        objective=partial(objective.objective, model=model.clone(axis_name=None), recipe=recipe),
        optimizer=optimizer,
    )
    states = [state.create(member, optimizer) for member in variables]
    keys = rng.member_keys(config, "augment")
    batches = {name: np.stack([rows] * len(states)) for name, rows in batch.items()}
    stacked, stacked_keys = state.stack(states), rng.stream(config, "augment")
    single = jax.jit(step)
    unrolled, mapped = jax.jit(steps.ensemble_step(step)), jax.jit(jax.vmap(step))
    loop = jax.jit(lambda *members: jax.lax.map(lambda member: step(*member), members))
    return {
        "single": lambda: [single(s, batch, key) for s, key in zip(states, keys, strict=True)],
        "unrolled": lambda: unrolled(stacked, batches, stacked_keys),
        "loop": lambda: loop(stacked, batches, stacked_keys),
        "vmap": lambda: mapped(stacked, batches, stacked_keys),
    }


if __name__ == "__main__":
    main()
