"""Train step and inference of BiCLIP, ours and of a PyTorch twin, for `benchmarks.bench`.

Both get the same noise. The twin is written from the description of the method. It has no text
encoder (its text embeddings are noise), uses a simpler photometric augmentation in its strong view,
and, as the published code, keeps the activations of that view until it is detached.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks.harness import Work
from reference import flops


def noise(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Returns greyscale uint8 images (B, S, S, 1) and masks."""
    size = config.model.image_size
    shape = (config.batch_size, size, size, 1)
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    return image, (image > 200).astype(np.uint8)


def noise_prompts(config: ConfigDict) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns encoded prompts of maximum length, and a host batch of noise with them."""
    from biclip_jax.encoders import text as text_encoders

    image, mask = noise(config)
    rows = config.batch_size
    prompt = " ".join(f"word{i % 27}" for i in range(config.model.text.max_length - 1))
    encoded_text = text_encoders.encode_splits(
        config.model.text.to_dict(), {"train": [prompt] * rows}, None
    )
    batch = {"image": image, "mask": mask, "row": np.arange(rows, dtype=np.int32)}
    return encoded_text, {**batch, **encoded_text.fields["train"]}


def train_step_ours(config: ConfigDict) -> Work:
    """Returns the train step: views, losses, backward pass, AdamW."""
    import jax

    from biclip_jax.core import distributed, rng
    from biclip_jax.experiment import program

    encoded_text, batch = noise_prompts(config)
    built = program.build(config, config.batch_size, encoded_text)
    labelled = np.arange(config.batch_size) < built.num_labelled_rows
    batch = built.shard({**batch, "labelled": labelled})
    state = built.place(built.initial)
    key = distributed.replicate(rng.stream(config, "augment"))
    count = flops.count(built.train_step, state, batch, key)

    def repeat() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(built.train_step(state, batch, key))

    return Work(repeat, count)


def inference_ours(config: ConfigDict) -> Work:
    """Returns the prediction step of `biclip predict`."""
    import jax

    from biclip_jax.evaluation.steps import predict_step
    from biclip_jax.experiment import biclip_spec

    encoded_text, batch = noise_prompts(config)
    model, (variables,) = biclip_spec.build_model(config, encoded_text, None, None)
    predict = jax.jit(partial(predict_step, model=model.clone(axis_name=None)))
    variables, batch = jax.device_put((variables, batch))
    return Work(
        lambda: jax.block_until_ready(predict(variables, batch)),
        flops.count(predict, variables, batch),
    )


def twin(config: ConfigDict, work: str, compiled: bool) -> Work:
    """Returns the twin's `train` step (as published or as in full) or `inference`."""
    import torch

    from reference.torch_biclip import TorchBiCLIP

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, levels = config.model.width, config.model.num_levels
    model = TorchBiCLIP(
        widths=tuple(width * 2**i for i in range(levels)),
        encoder_widths=(width, 4 * width),
        cycle_widths=(width // 2, width),
        image_size=config.model.image_size,
        level_hidden=config.model.bmf.hidden if config.model.bmf.levels else 0,
    ).to(device)
    if device == "cuda":
        # Usual settings of PyTorch users.
        model = model.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True
    pixels, masks = (torch.from_numpy(x).permute(0, 3, 1, 2).to(device) for x in noise(config))
    text = torch.randn(config.batch_size, 768, device=device)
    low = config.model.dtype != "float32"
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=low)
    compiler = torch.compile if compiled else _identity
    if work == "inference":
        call = _inference(model.eval(), pixels, text, compiler)
    else:
        loss = _full if config.loss.views == "both" else _published
        call = _train_step(model.train(), partial(loss, pixels, masks, text, compiler), config)

    def repeat() -> None:
        with autocast():
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    return Work(repeat)


def _identity(function: Callable) -> Callable:
    return function


def _inference(model: Any, pixels: Any, text: Any, compiler: Callable) -> Callable[[], None]:
    import torch

    forward = compiler(model)

    def call() -> None:
        with torch.inference_mode():
            torch.sigmoid(forward((pixels.float() / 255).expand(-1, 3, -1, -1), text))

    return call


def _train_step(model: Any, make: Callable, config: ConfigDict) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.learning_rate)
    loss_of = make(model)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        optimizer.step()

    return call


def _random_affine(pixels: Any) -> tuple[Any, Callable]:
    """Returns RGB images in [0, 1] and a random affine transformation of the batch."""
    import torch
    from torch.nn import functional

    image = (pixels.float() / 255).expand(-1, 3, -1, -1)
    matrix = torch.eye(2, 3) + 0.1 * torch.randn(len(image), 2, 3)
    grid = functional.affine_grid(matrix.to(image), list(image.shape), align_corners=False)
    return image, lambda x: functional.grid_sample(x, grid.to(x), align_corners=False)


def _published(pixels: Any, masks: Any, text: Any, compiler: Callable, model: Any) -> Callable:
    import torch

    from reference.torch_biclip import published_loss

    compiled = compiler(published_loss)

    def loss_of() -> Any:
        image, transform = _random_affine(pixels)
        mask, weak = masks.float(), transform(image)
        photometric = (weak.clamp_min(1e-3) ** 1.05 * 1.1 + 0.01 * torch.randn_like(weak)).clamp(
            0, 1
        )
        views = (weak, transform, transform(mask).round()), (photometric, transform)
        return compiled(model, image, text, mask, *views)[0]

    return loss_of


def _full(pixels: Any, masks: Any, text: Any, compiler: Callable, model: Any) -> Callable:
    import torch

    from reference.torch_biclip import full_loss

    compiled = compiler(full_loss)

    def change(x: Any) -> Any:
        return (1.1 * x + 0.1 * torch.randn_like(x)).clamp(0, 1)

    def loss_of() -> Any:
        image, transform = _random_affine(pixels)
        side = image.shape[-1]
        box = torch.zeros_like(masks, dtype=torch.bool)
        box[:, :, side // 4 : side // 2, side // 4 :] = True
        weak, mask = transform(image), transform(masks.float()).round()
        return compiled(model, weak, text, mask, box, change)[0]

    return loss_of
