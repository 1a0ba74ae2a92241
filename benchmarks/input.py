"""Speed of the input pipeline, and overhead of progress bar and logging.

    python -m benchmarks.input --config qata

Images and masks of noise in memory, with prompts, at the image size and batch size of the config.
Prints one JSON line each: images per second of `train_batches`, including the transfer to the
devices; images per second of a split on the device, which sends only row numbers; microseconds of
the progress bar per step, and of a log line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from biclip_jax.core import config as config_lib
from biclip_jax.core import distributed
from biclip_jax.data import pipeline
from biclip_jax.data import text as text_lib
from biclip_jax.training import writers

NUM_RECORDS, NUM_BATCHES = 512, 64


def main() -> None:
    """Prints all lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="qata")
    parser.add_argument("--rounds", type=int, default=5)
    args, overrides = parser.parse_known_args()
    config = config_lib.load_config(args.config, overrides)
    facts = {"config": config.name, "image_size": config.model.image_size}
    facts |= {"batch_size": config.batch_size}
    for name, seconds in feeds(config, args.rounds).items():
        rate = round(config.batch_size / seconds, 1)
        print(json.dumps({"name": name, **facts, "images_per_s": rate}))
    for name, seconds in logging(args.rounds).items():
        print(json.dumps({"name": name, "us": round(1e6 * seconds, 1)}))


def records_of_noise(size: int) -> list[Any]:
    """Returns greyscale images, masks and prompts."""
    rng = np.random.default_rng(0)
    return [
        {
            "id": str(i),
            "image": rng.integers(0, 256, (size, size, 1), np.uint8),
            "mask": rng.integers(0, 2, (size, size, 1), np.uint8),
            "text": f"infection {i % 7} of the left lung",
        }
        for i in range(NUM_RECORDS)
    ]


def feeds(config: Any, rounds: int) -> dict[str, float]:
    """Returns {input feed: seconds per batch}, medians over rounds."""
    records = records_of_noise(config.model.image_size)
    tokenizer = text_lib.build_tokenizer([r["text"] for r in records])

    encode = partial(text_lib.encode_fields, tokenizer, max_length=config.model.text.max_length)
    texts = pipeline.text_fields(encode, [r["text"] for r in records])
    rows = pipeline.training_order(len(records), batch_size=config.batch_size, seed=0)
    streamed = pipeline.train_batches(records, texts, rows)
    steps = iter(range(10**9))
    feeds = {
        "streamed": lambda: distributed.shard_batch(next(streamed)),
        "on_device": lambda: distributed.shard_batch(rows(next(steps))),
    }
    return {name: median_seconds(feed, NUM_BATCHES, rounds) for name, feed in feeds.items()}


def logging(rounds: int) -> dict[str, float]:
    """Returns the seconds of one progress update and of one log line."""
    values = {"loss": 0.5, "loss_seg": 0.4, "grad_norm": 1.0, "lr": 1e-3, "skipped": 0}
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stdout(devnull),
        writers.Writer(Path(folder), 10**6, 0) as writer,
    ):
        steps = iter(range(1, 10**9))
        return {
            "progress": median_seconds(lambda: writer.advance(next(steps)), 1000, rounds),
            "log_line": median_seconds(
                lambda: writer.write(next(steps), "train", values), 20, rounds
            ),
        }


def median_seconds(call: Callable[[], Any], number: int, rounds: int) -> float:
    """Returns the median over rounds of the seconds per call, without the first round."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(number):
            call()
        seconds.append((time.perf_counter() - start) / number)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
