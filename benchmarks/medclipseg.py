"""MedCLIPSeg, ours and of a PyTorch twin, for `benchmarks.bench`.

One pass with new noise, one train step (losses of the reference, Adam on the trainable parameters),
30 samples; 224 px, random weights. The twin computes everything that the published program
computes, including unused results.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks.harness import Work
from reference import flops

VARIANTS = ("clip", "unimedclip")
BATCHES = {"pass": (1, 4), "train": (1, 4), "samples": (1,)}
LENGTHS = {"clip": 77, "unimedclip": 256}
NUM_TOKENS, SIZE = 20, 224
NUM_SAMPLES, CHUNK = 30, 10
LEARNING_RATE = 3e-4


class Inputs(NamedTuple):
    """Images (B, 224, 224, 3) in [0, 1], masks (B, 224, 224) in {0, 1}, token ids (B, L)."""

    image: np.ndarray
    mask: np.ndarray
    ids: np.ndarray


def ours(variant: str, work: str, batch: int) -> Work:
    """Returns a work of `BATCHES`."""
    works = {"pass": pass_ours, "train": train_step_ours, "samples": samples_ours}
    return works[work](variant, inputs(variant, batch))


def inputs(variant: str, batch: int) -> Inputs:
    """Returns noise, and padded prompts of 20 tokens that end with the largest id."""
    rng = np.random.default_rng(0)
    image = rng.random((batch, SIZE, SIZE, 3), dtype=np.float32)
    mask = (image[..., 0] > 0.8).astype(np.float32)
    ids = np.zeros((batch, LENGTHS[variant]), np.int32)
    ids[:, :NUM_TOKENS] = rng.integers(5, 30000, (batch, NUM_TOKENS))
    ids[:, NUM_TOKENS - 1] = 30001
    return Inputs(image, mask, ids)


def model_ours(variant: str):
    """Returns the model in its published size, without dropout, as the twin and by default."""
    from biclip_jax.models import medclipseg

    encoders = medclipseg.ENCODERS[variant]
    config = {
        "image": encoders["image"],
        "text": {n: 0.0 if n == "dropout" else value for n, value in encoders["text"].items()},
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
    return medclipseg.build(config)


def build_ours(variant: str):
    """Returns `model_ours` with initial variables."""
    import jax

    from biclip_jax.models import medclipseg

    model = model_ours(variant)
    return model, medclipseg.init(model, jax.random.key(0), LENGTHS[variant])


def pass_ours(variant: str, data: Inputs) -> Work:
    """Returns one pass, with new noise in every call."""
    import jax

    model, variables = build_ours(variant)
    image, ids = jax.device_put((data.image, data.ids))
    key = jax.random.key(1)

    @jax.jit
    def forward(variables, image, ids, keys):
        return model.apply(variables, image, ids, ids > 0, noise=keys)[0]

    def repeat():
        nonlocal key
        keys = jax.random.split(key, 1 + len(image))
        key = keys[0]
        return jax.block_until_ready(forward(variables, image, ids, keys[1:]))

    return Work(
        repeat, flops.count(forward, variables, image, ids, jax.random.split(key, len(image)))
    )


def samples_ours(variant: str, data: Inputs) -> Work:
    """Returns the mean of 30 samples."""
    import jax

    from biclip_jax.models import medclipseg

    model, variables = build_ours(variant)
    image, ids = jax.device_put((data.image, data.ids))
    keys = jax.random.split(jax.random.key(1), len(image))

    @jax.jit
    def sample(variables, image, ids, keys):
        return medclipseg.sample_statistics(
            model, variables, image, ids, ids > 0, keys, num_samples=NUM_SAMPLES, chunk=CHUNK
        ).mean

    return Work(
        lambda: jax.block_until_ready(sample(variables, image, ids, keys)),
        flops.count(sample, variables, image, ids, keys),
    )


def train_step_ours(variant: str, data: Inputs) -> Work:
    """Returns one train step.

    0.5 Dice over rows + 0.5 binary cross-entropy + 0.1 contrastive loss as released, no dropout,
    Adam with `LEARNING_RATE` on the adapters and the head; no gradient into the encoders.
    """
    import jax
    import optax

    from biclip_jax.models import medclipseg
    from biclip_jax.training import state, steps, views
    from biclip_jax.training.objectives import medclipseg as objective

    model, variables = build_ours(variant)
    recipe = objective.Recipe(
        weights={"dice": 0.5, "bce": 0.5, "contrastive": 0.1},
        dice="rows",
        contrastive="released",
        geometry=views.Geometry(horizontal_flip=0.0, vertical_flip=0.0, affine=0.0),
    )
    optimizer = optax.adam(LEARNING_RATE)
    current = state.create(variables, optimizer, medclipseg.FROZEN)
    ids = data.ids
    text = {"text_ids": ids, "text_mask": ids > 0, "has_text": ids[:, 0] > 0}
    batch = {
        "image": np.rint(255 * data.image).astype(np.uint8),
        "mask": data.mask[..., None].astype(np.uint8),
        "row": np.arange(len(ids), dtype=np.int32),
        **text,
        **{f"swapped_{name}": value for name, value in text.items()},
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

    count = flops.count(step, current, batch, jax.random.key(1))

    def repeat():
        nonlocal current
        current, metrics = step(current, batch, jax.random.key(1))
        return jax.block_until_ready(metrics)

    return Work(repeat, count)


def twin(variant: str, work: str, batch: int, compiled: bool) -> Work:
    """Returns a work of `BATCHES` of the twin, with one thread per core."""
    import torch

    from reference import torch_clip, torch_medclipseg, torch_medclipseg_losses

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = inputs(variant, batch)
    model = torch_medclipseg.MedCLIPSeg(variant, as_published=True)
    model = torch_clip.randomize_(model, 0).to(device)
    image = torch.from_numpy(data.image).permute(0, 3, 1, 2).contiguous().to(device)
    mask, ids = torch.from_numpy(data.mask).to(device), torch.from_numpy(data.ids).long()
    ids, generator = ids.to(device), torch.Generator(device).manual_seed(1)
    trainable = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=LEARNING_RATE)
    passes = torch.compile(model) if compiled else model

    def forward():
        with torch.inference_mode():
            passes(image, ids, model.draw_noise(ids, generator))

    def samples():
        torch_medclipseg.monte_carlo(model, image, ids, NUM_SAMPLES, generator)

    def train_step():
        optimizer.zero_grad(set_to_none=True)
        noise = model.draw_noise(ids, generator)
        logits, features, text = passes(image, ids, noise, return_features=True)
        torch_medclipseg_losses.total(logits, mask, features, text).backward()
        optimizer.step()

    call = {"pass": forward, "train": train_step, "samples": samples}[work]

    def repeat() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return Work(repeat)
