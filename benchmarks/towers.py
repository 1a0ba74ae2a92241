"""Forward passes of the towers, ours and transformers' on PyTorch in turn in one run.

    python -m benchmarks.towers

BERT-base on 32 tokens and CLIP's ViT-B/16 on 224 px, random weights, batch 1 and 8, all hidden
states given out. Each implementation runs in processes of its own, one after the other, several
rounds of both. One JSON line a case: the median of all warm passes, the time until the first was
done (compilation included), and the ratio. Needs the extra `parity`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from biclip_jax import cli

CASES = [(name, batch) for name in ("bert", "vit_b16") for batch in (1, 8)]
LENGTH, SIZE = 32, 224


def main() -> None:
    """Runs both in turn, or one of them where a child process is told so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=7, help="warm passes a round and case")
    parser.add_argument("--only", choices=("jax", "torch"), help="this one, in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.passes)))
        return
    found: dict[str, list] = {"jax": [], "torch": []}
    for _ in range(args.rounds):
        for name, rounds in found.items():
            command = [sys.executable, "-m", "benchmarks.towers", "--only", name]
            command += ["--passes", str(args.passes)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
    for i, (tower, batch) in enumerate(CASES):
        entry: dict = {"tower": tower, "batch": batch}
        for name, rounds in found.items():
            warm = [1000 * s for round_ in rounds for s in round_[i]["warm_s"]]
            entry[f"{name}_ms"] = round(statistics.median(warm), 1)
            entry[f"{name}_ms_quartiles"] = [round(x, 1) for x in statistics.quantiles(warm)[::2]]
            first = statistics.median(round_[i]["first_s"] for round_ in rounds)
            entry[f"{name}_first_s"] = round(first, 2)
        entry["speed_jax_over_torch"] = round(entry["torch_ms"] / entry["jax_ms"], 2)
        print(json.dumps(entry), flush=True)


def measure(name: str, passes: int) -> list[dict]:
    """Every case: seconds of the first pass and of the warm ones."""
    if name == "jax":
        cli.set_xla_flags()
    make = {"jax": jax_pass, "torch": torch_pass}[name]
    entries = []
    for tower, batch in CASES:
        forward = make(tower, batch)
        seconds = []
        for _ in range(passes + 2):
            start = time.perf_counter()
            forward()
            seconds.append(time.perf_counter() - start)
        entries.append({"first_s": seconds[0], "warm_s": seconds[2:]})
    return entries


def inputs(tower: str, batch: int) -> np.ndarray:
    """Ids (B, 32) or normalised pictures (B, 224, 224, 3)."""
    rng = np.random.default_rng(0)
    if tower == "bert":
        return rng.integers(5, 30000, (batch, LENGTH))
    return rng.normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)


def jax_pass(tower: str, batch: int) -> Callable[[], object]:
    """One call is one pass."""
    import jax
    import jax.numpy as jnp

    from biclip_jax.models import bert, clip

    x = jnp.asarray(inputs(tower, batch))
    if tower == "bert":
        model, given = bert.Bert(), (x, jnp.ones(x.shape, bool))
    else:
        model, given = clip.build_image_encoder(clip.VIT_B16), (x,)
    variables = jax.jit(model.init)(jax.random.key(0), *given)

    @jax.jit
    def apply(variables, *given):
        embedding, aux = model.apply(variables, *given)
        return embedding, aux["hidden_states"]

    return lambda: jax.block_until_ready(apply(variables, *given))


def torch_pass(tower: str, batch: int) -> Callable[[], object]:
    """One call is one pass of transformers' model, eager, on as many threads as there are cores."""
    import torch
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    x = torch.from_numpy(inputs(tower, batch))
    if tower == "bert":
        model = BertModel(BertConfig(), add_pooling_layer=False).eval()
        given = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    else:
        config = CLIPVisionConfig(patch_size=16)
        model = CLIPVisionModelWithProjection(config).eval()
        given = {"pixel_values": x.permute(0, 3, 1, 2).contiguous()}

    def forward():
        with torch.inference_mode():
            return model(**given, output_hidden_states=True)

    return forward


if __name__ == "__main__":
    main()
