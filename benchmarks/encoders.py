"""Forward passes of the towers, ours and transformers' on PyTorch: what `benchmarks.bench` times.

BERT-base on 32 tokens and CLIP's ViT-B/16 on 224 px, random weights, all hidden states given out.
"""

from __future__ import annotations

import numpy as np

from benchmarks import flops
from benchmarks.harness import Work

NAMES = ("vit_b16", "bert")
LENGTH, SIZE = 32, 224


def inputs(encoder: str, batch: int) -> np.ndarray:
    """Ids (B, 32) or normalised pictures (B, 224, 224, 3)."""
    rng = np.random.default_rng(0)
    if encoder == "bert":
        return rng.integers(5, 30000, (batch, LENGTH))
    return rng.normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)


def ours(encoder: str, batch: int) -> Work:
    """One call is one pass."""
    import jax
    import jax.numpy as jnp

    from biclip_jax.models import bert, clip

    x = jnp.asarray(inputs(encoder, batch))
    if encoder == "bert":
        model, given = bert.Bert(), (x, jnp.ones(x.shape, bool))
    else:
        model, given = clip.build_image_encoder(clip.VIT_B16), (x,)
    variables = jax.jit(model.init)(jax.random.key(0), *given)

    @jax.jit
    def apply(variables, *given):
        embedding, aux = model.apply(variables, *given)
        return embedding, aux["hidden_states"]

    return Work(
        lambda: jax.block_until_ready(apply(variables, *given)),
        flops.count(apply, variables, *given),
    )


def twin(encoder: str, batch: int, compiled: bool) -> Work:
    """One call is one pass of transformers' model, on as many threads as there are cores."""
    import torch
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.from_numpy(inputs(encoder, batch)).to(device)
    if encoder == "bert":
        model = BertModel(BertConfig(), add_pooling_layer=False).eval()
        given = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    else:
        config = CLIPVisionConfig(patch_size=16)
        model = CLIPVisionModelWithProjection(config).eval()
        given = {"pixel_values": x.permute(0, 3, 1, 2).contiguous()}

    model = model.to(device)
    passes = torch.compile(model) if compiled else model

    def forward() -> None:
        with torch.inference_mode():
            passes(**given, output_hidden_states=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return Work(forward)
