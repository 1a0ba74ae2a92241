"""Time and peak memory of a whole train step, ours and a PyTorch twin's in turn in one run.

    python -m benchmarks.train_step --config qata --steps 2

Each runs in a process of its own, on the same threads, over the same noise: forward and backward of
the weak view, forward of the strong one, losses, AdamW. One JSON line each: seconds of every warm
step, seconds until the first one was done (compilation included), peak resident memory; and a line
with the ratios. Needs the extra `parity`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from biclip_jax import cli


def main() -> None:
    """Runs both in turn, or one of them where a child process is told so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="qata")
    parser.add_argument("--steps", type=int, default=2, help="warm steps")
    parser.add_argument("--only", choices=("jax", "torch"), help="this one, in this process")
    args, overrides = parser.parse_known_args()
    config = cli.load_config(args.config, overrides)
    if args.only:
        print(json.dumps(measure(args.only, config, args.steps)))
        return
    found = {}
    for name in ("jax", "torch"):
        command = [sys.executable, "-m", "benchmarks.train_step", "--only", name]
        command += ["--config", args.config, "--steps", str(args.steps), *overrides]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(found[name]), flush=True)
    ours, other = found["jax"], found["torch"]
    ratios = {
        "speed_jax_over_torch": other["step_s"] / ours["step_s"],
        "memory_jax_over_torch": ours["peak_mib"] / other["peak_mib"],
    }
    print(json.dumps(ratios))


def measure(name: str, config, steps: int) -> dict:
    """One entry: builds the step, takes a cold and `steps` warm ones."""
    if name == "jax":
        cli.set_xla_flags()
        cli.keep_memory()
    step = {"jax": jax_step, "torch": torch_step}[name](config)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {
        "name": name,
        "config": config.name,
        "batch_size": config.batch_size,
        "image_size": config.model.image_size,
        "width": config.model.width,
        "first_step_s": round(seconds[0], 3),
        "step_s": round(statistics.median(seconds[1:]), 3),
        "steps_s": [round(s, 3) for s in seconds[1:]],
        "images_per_second": round(config.batch_size / statistics.median(seconds[1:]), 3),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def noise(config) -> tuple[np.ndarray, np.ndarray]:
    """A grey uint8 picture (B, S, S, 1) and its mask."""
    size = config.model.image_size
    shape = (config.batch_size, size, size, 1)
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    return image, (image > 200).astype(np.uint8)


def sentences_of_noise(config):
    """Sentences as long as they can be, and a host batch of noise with them."""
    from biclip_jax import sentences

    image, mask = noise(config)
    rows = config.batch_size
    sentence = " ".join(f"word{i % 27}" for i in range(config.model.text.max_length - 1))
    spoken = sentences.read(config.model.text.to_dict(), {"train": [sentence] * rows}, None)
    batch = {"image": image, "mask": mask, "row": np.arange(rows, dtype=np.int32)}
    return spoken, {**batch, **spoken.fields["train"]}


def jax_step(config):
    """One call is one step of the training program itself."""
    import jax

    from biclip_jax import assembly, parallel, program

    spoken, batch = sentences_of_noise(config)
    built = program.build(config, config.batch_size, spoken)
    labelled = np.arange(config.batch_size) < built.labelled_rows
    batch = parallel.shard({**batch, "labelled": labelled})
    state = parallel.replicate(built.initial)
    key = parallel.replicate(assembly.stream(config, "augment"))

    def step():
        nonlocal state
        state, _ = jax.block_until_ready(built.train_step(state, batch, key))

    return step


def torch_step(config):
    """One call is one step of the twin: views by grid_sample, losses, backward, AdamW."""
    import torch
    from torch.nn import functional

    from tests.torch_twin import TorchBiCLIP, published_loss

    torch.manual_seed(0)
    width, levels = config.model.width, config.model.num_levels
    model = TorchBiCLIP(
        widths=tuple(width * 2**i for i in range(levels)),
        encoder_widths=(width, 4 * width),
        cycle_widths=(width // 2, width),
        image_size=config.model.image_size,
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.learning_rate)
    pixels, labels = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in noise(config))
    text = torch.randn(config.batch_size, 768)

    import os

    loss_of = torch.compile(published_loss) if os.environ.get("TC") else published_loss

    def step():
        image = (pixels.float() / 255).expand(-1, 3, -1, -1)
        mask = labels.float()
        matrix = torch.eye(2, 3) + 0.1 * torch.randn(len(image), 2, 3)
        grid = functional.affine_grid(matrix, list(image.shape), align_corners=False)

        def move(x):
            return functional.grid_sample(x, grid, align_corners=False)

        weak = move(image)
        light = (weak.clamp_min(1e-3) ** 1.05 * 1.1 + 0.01 * torch.randn_like(weak)).clamp(0, 1)
        views = (weak, move, move(mask).round()), (light, move)
        optimizer.zero_grad(set_to_none=True)
        loss, _ = loss_of(model, image, text, mask, *views)
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
