"""The synthetic set: drawn chest-like pictures, with no download and no folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from biclip_jax.data.builders import records
from biclip_jax.data.builders.drawing import draw_example
from biclip_jax.data.schema import Split

DEFAULT_SIZES: dict[Split, int] = {"train": 800, "val": 100, "test": 200}
# Another seed a split, so that no split's pictures depend on another's size.
SEEDS: dict[Split, int] = {"train": 0, "val": 1, "test": 2}


class Synthetic(tfds.core.GeneratorBasedBuilder):
    """Records of `drawing.draw_example`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, image_size: int, num_examples: dict[Split, int], **kwargs: Any):
        """Keeps what `_info` needs before TFDS calls it."""
        self.image_size, self.num_examples = image_size, num_examples
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Drawn chests with three or four lesions; the sentence tells which count.",
            features=records.features(self.image_size, channels=1),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(split) for split in self.num_examples}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict]]:
        for index in range(self.num_examples[split]):
            image, mask, text = draw_example(SEEDS[split], index, self.image_size)
            name = f"{split}_{index:05d}"
            record = records.RecordWithVariants(
                id=name, image=image, mask=mask, full_mask=mask, text=text
            )
            yield index, records.encode(record)
