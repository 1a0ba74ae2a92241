"""The synthetic dataset: drawn chest-like images; needs no download and no folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from biclip_jax.data.builders import records
from biclip_jax.data.builders.drawing import draw_example
from biclip_jax.data.schema import Split

DEFAULT_SIZES: dict[Split, int] = {"train": 800, "val": 100, "test": 200}
# One seed per split, so that a split's images do not depend on the sizes of the others.
SEEDS: dict[Split, int] = {"train": 0, "val": 1, "test": 2}


def encoded_examples(split: Split, num_examples: int, image_size: int) -> Iterator[dict[str, Any]]:
    """Yields the encoded records of a split, for `single_file.write`.

    Args:
      split: "train", "val" or "test".
      num_examples: Size of the split.
      image_size: Side of images and masks in pixels.
    """
    for index in range(num_examples):
        image, mask, text = draw_example(SEEDS[split], index, image_size)
        yield records.encode(
            records.RecordWithVariants(
                id=f"{split}_{index:05d}", image=image, mask=mask, full_mask=mask, text=text
            )
        )
