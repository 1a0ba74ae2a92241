"""Forward passes of the encoders, ours and of transformers on PyTorch, for `benchmarks.bench`.

BERT-base on 32 tokens and CLIP ViT-B/16 on 224 px, random weights, all hidden states returned.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Work
from reference import flops

NAMES = ("vit_b16", "bert")
LENGTH, SIZE = 32, 224


def inputs(encoder: str, batch: int) -> np.ndarray:
    """Returns token ids (B, 32) or normalized images (B, 224, 224, 3)."""
    rng = np.random.default_rng(0)
    if encoder == "bert":
        return rng.integers(5, 30000, (batch, LENGTH))
    return rng.normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)


def ours(encoder: str, batch: int) -> Work:
    """Returns one forward pass."""
    import jax
    import jax.numpy as jnp

    from biclip_jax.models import bert, clip

    x = jnp.asarray(inputs(encoder, batch))
    if encoder == "bert":
        model, args = bert.Bert(), (x, jnp.ones(x.shape, bool))
    else:
        model, args = clip.build_image_encoder(clip.VIT_B16), (x,)
    variables = jax.jit(model.init)(jax.random.key(0), *args)

    @jax.jit
    def apply(variables, *args):
        embedding, aux = model.apply(variables, *args)
        return embedding, aux["hidden_states"]

    return Work(
        lambda: jax.block_until_ready(apply(variables, *args)),
        flops.count(apply, variables, *args),
    )


def twin(encoder: str, batch: int, compiled: bool) -> Work:
    """Returns one forward pass of the model of transformers, with one thread per core."""
    import torch
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.from_numpy(inputs(encoder, batch)).to(device)
    if encoder == "bert":
        model = BertModel(BertConfig(), add_pooling_layer=False).eval()
        args = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    else:
        config = CLIPVisionConfig(patch_size=16)
        model = CLIPVisionModelWithProjection(config).eval()
        args = {"pixel_values": x.permute(0, 3, 1, 2).contiguous()}

    model = model.to(device)
    passes = torch.compile(model) if compiled else model

    def forward() -> None:
        with torch.inference_mode():
            passes(**args, output_hidden_states=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return Work(forward)
