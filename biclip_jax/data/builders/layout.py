"""One TFDS builder for every data set that lies on disk in a layout of `data.layouts`.

To add a data set, add a config. `folder` takes any folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from biclip_jax.core.errors import BadImageError
from biclip_jax.data.annotations import combine_problems
from biclip_jax.data.builders import records
from biclip_jax.data.image_io import read_image, read_mask, resize_image, resize_mask
from biclip_jax.data.schema import SPLITS, Example, Record, Split

CONFIGS = (
    tfds.core.BuilderConfig(
        name="qata_cov19",
        description=(
            "QaTa-COV19 v2: chest X-rays with masks of COVID-19 infection, a sentence each on "
            "the infected zones. Left means the left half of the picture. Usual split sizes: "
            "5716 train, 1429 val, 2113 test. Pictures: Degerli et al., OSegNet, ICIP 2022."
        ),
    ),
    tfds.core.BuilderConfig(
        name="mosmed_plus",
        description=(
            "MosMedData+: slices of chest CT with masks of COVID-19 infection, a sentence each. "
            "It is split by slice, so slices of one patient are in several splits and its "
            "scores are optimistic. Usual split sizes: 2183 train, 273 val, 273 test. Pictures: "
            "Morozov et al., medRxiv 2020; Hofmanninger et al., European Radiology "
            "Experimental 2020."
        ),
    ),
    tfds.core.BuilderConfig(
        name="kvasir_seg",
        description=(
            "Kvasir-SEG: colonoscopy frames with polyp masks. Usual split sizes: 800 train, 100 "
            "val, 100 test. Pictures: Jha et al., MMM 2020; sentences: Poudel et al., MedVLSM, "
            "MIDL 2024."
        ),
    ),
    tfds.core.BuilderConfig(
        name="clinicdb",
        description=(
            "CVC-ClinicDB: colonoscopy frames with polyp masks; frames of one sequence may be in "
            "several splits. Usual split sizes: 490 train, 61 val, 61 test. Pictures: Bernal et "
            "al., CMIG 43, 2015; sentences: Poudel et al., MedVLSM, MIDL 2024."
        ),
    ),
    tfds.core.BuilderConfig(
        name="folder", description="Any folder of pictures, masks and sentences in a known layout."
    ),
)

CITATION = "Text of QaTa-COV19 and MosMedData+: Li et al., LViT, IEEE TMI 2023."


class LayoutDataset(tfds.core.GeneratorBasedBuilder):
    """Records made of Examples; the splits are those that have examples."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = list(CONFIGS)

    def __init__(
        self,
        *,
        examples: list[Example],
        variants: dict[str, dict[str, str]],
        image_size: int,
        channels: int,
        resize: str,
        **kwargs: Any,
    ):
        """Keeps what `_info` needs before TFDS calls it.

        See `layouts.read_variants` for `variants`, `check_files` for `channels`,
        `image_io.RESIZE_METHODS` for `resize`.
        """
        self.examples, self.variants = examples, variants
        self.image_size, self.channels, self.resize = image_size, channels, resize
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            citation=CITATION,
            features=records.features(self.image_size, self.channels),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        present = [s for s in SPLITS if any(example.split == s for example in self.examples)]
        return {split: self._generate_examples(split) for split in present}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict]]:
        chosen = (example for example in self.examples if example.split == split)
        for index, example in enumerate(chosen):
            record = read_record(example, self.image_size, self.channels, self.resize)
            variants = self.variants.get(example.id, {})
            yield index, records.encode(records.RecordWithVariants(**record, variants=variants))


def read_record(example: Example, image_size: int, channels: int, resize: str) -> Record:
    """Reads one example's files and resizes them; its image has `channels` channels."""
    image, mask = _read(example, resize)
    image = resize_image(image[..., :channels], image_size, resize)
    return Record(
        id=example.id,
        image=np.broadcast_to(image, (image_size, image_size, channels)),
        mask=resize_mask(mask, image_size, resize),
        full_mask=mask,
        text=example.text,
    )


def _read(example: Example, resize: str) -> tuple[np.ndarray, np.ndarray]:
    """The picture and its mask; an empty one for a picture that has none."""
    image = read_image(example.image_path)
    if not example.mask_path:
        return image, np.zeros((*image.shape[:2], 1), np.uint8)
    return image, read_mask(example.mask_path, resize)


def check_files(source: str, examples: list[Example], resize: str) -> int:
    """Decodes every picture and mask once, before anything is written.

    Args:
      source: what to call the data set in an error.
      examples: the examples to look at.
      resize: of `image_io.RESIZE_METHODS`, as they will be read.

    Returns:
      1 if all pictures are grey, be it stored as RGB with equal channels, else 3.

    Raises:
      DataError: pictures that cannot be read or differ from their masks in size, all at once.
    """
    problems = []
    channels = 1
    for example in examples:
        try:
            image, mask = _read(example, resize)
        except BadImageError as error:
            problems.append(str(error))
            continue
        if image.shape[:2] != mask.shape[:2]:
            problems.append(
                f"{example.image_path}: found {image.shape[1]} x {image.shape[0]} pixels; expected "
                f"{mask.shape[1]} x {mask.shape[0]} as in {example.mask_path}; export both again "
                "at one size."
            )
        if channels == 1 and not (image == image[..., :1]).all():
            channels = 3
    if problems:
        raise combine_problems(source, problems)
    return channels
