"""Time of a train step of K models: K calls, one program in turn, in a loop, or mapped.

    python -m benchmarks.ensemble --config qata:small,published --members 3 --steps 5

Over the same noise, in turn in one process, warm, median. One JSON line each: seconds for one
step of all K, seconds until the first one was done; and a line with the ratios to K single steps.
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
    """Builds them, then times them in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="qata:small")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="warm steps")
    parser.add_argument("--only", default="single,in_turn,loop,vmap", metavar="A,B")
    args, overrides = parser.parse_known_args()
    runtime.set_xla_flags()
    config = config_lib.load_config(args.config, [*overrides, f"--config.ensemble={args.members}"])
    takers = {name: take for name, take in build(config).items() if name in args.only.split(",")}
    first = {name: seconds_of(take) for name, take in takers.items()}
    warm: dict[str, list[float]] = {name: [] for name in takers}
    for _ in range(args.steps):
        for name, take in takers.items():
            warm[name].append(seconds_of(take))
    step = {name: statistics.median(seconds) for name, seconds in warm.items()}
    for name in takers:
        line = {"name": name, "config": config.name, "members": args.members}
        print(json.dumps({**line, "first_step_s": first[name], "step_s": step[name]}))
    if "single" in step:
        ratios = {f"speed_{name}_over_single": step["single"] / step[name] for name in takers}
        print(json.dumps(ratios))


def seconds_of(take: Callable[[], Any]) -> float:
    """One call, to its end."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(take())
    return time.perf_counter() - start


def build(config: Any) -> dict[str, Callable[[], Any]]:
    """{name: one step of all members}; each keeps its own state, all begin alike."""
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
    states = [state.create(fresh, optimizer) for fresh in variables]
    keys = rng.member_keys(config, "augment")
    batches = {name: np.stack([rows] * len(states)) for name, rows in batch.items()}
    ensemble_with, stacked_keys = state.stack(states), rng.stream(config, "augment")
    single = jax.jit(step)
    in_turn, mapped = jax.jit(steps.ensemble_step(step)), jax.jit(jax.vmap(step))
    loop = jax.jit(lambda *members: jax.lax.map(lambda one: step(*one), members))
    return {
        "single": lambda: [single(s, batch, key) for s, key in zip(states, keys, strict=True)],
        "in_turn": lambda: in_turn(ensemble_with, batches, stacked_keys),
        "loop": lambda: loop(ensemble_with, batches, stacked_keys),
        "vmap": lambda: mapped(ensemble_with, batches, stacked_keys),
    }


if __name__ == "__main__":
    main()
