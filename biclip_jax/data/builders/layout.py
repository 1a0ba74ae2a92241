"""A TFDS builder for all datasets on disk in a layout of `data.layouts`.

To add a dataset, add a config. The config `folder` accepts any folder.
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
            "QaTa-COV19 v2: chest X-rays with masks of COVID-19 infection; each caption describes "
            "the infected zones. Left means the left half of the image. Usual split sizes: "
            "5716 train, 1429 val, 2113 test. Images: Degerli et al., OSegNet, ICIP 2022."
        ),
    ),
    tfds.core.BuilderConfig(
        name="mosmed_plus",
        description=(
            "MosMedData+: slices of chest CT with masks of COVID-19 infection and captions. "
            "It is split by slice, so slices of one patient are in several splits and its "
            "scores are optimistic. Usual split sizes: 2183 train, 273 val, 273 test. Images: "
            "Morozov et al., medRxiv 2020; Hofmanninger et al., European Radiology "
            "Experimental 2020."
        ),
    ),
    tfds.core.BuilderConfig(
        name="kvasir_seg",
        description=(
            "Kvasir-SEG: colonoscopy frames with polyp masks. Usual split sizes: 800 train, 100 "
            "val, 100 test. Images: Jha et al., MMM 2020; captions: Poudel et al., MedVLSM, "
            "MIDL 2024."
        ),
    ),
    tfds.core.BuilderConfig(
        name="clinicdb",
        description=(
            "CVC-ClinicDB: colonoscopy frames with polyp masks; frames of one sequence may be in "
            "several splits. Usual split sizes: 490 train, 61 val, 61 test. Images: Bernal et "
            "al., CMIG 43, 2015; captions: Poudel et al., MedVLSM, MIDL 2024."
        ),
    ),
    tfds.core.BuilderConfig(
        name="folder", description="Any folder of images, masks and prompts in a known layout."
    ),
)

CITATION = "Text of QaTa-COV19 and MosMedData+: Li et al., LViT, IEEE TMI 2023."


class LayoutDataset(tfds.core.GeneratorBasedBuilder):
    """Builds records from Examples; splits without examples are left out."""

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
        """Stores the arguments, which `_info` needs before TFDS calls it.

        Args:
          examples: Examples of all splits.
          variants: See `layouts.read_variants`.
          image_size: Side of images and masks in pixels.
          channels: See `check_files`.
          resize: Value of `image_io.RESIZE_METHODS`.
          **kwargs: Passed to the TFDS builder.
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
        split_examples = (example for example in self.examples if example.split == split)
        for index, example in enumerate(split_examples):
            record = read_record(example, self.image_size, self.channels, self.resize)
            variants = self.variants.get(example.id, {})
            yield index, records.encode(records.RecordWithVariants(**record, variants=variants))


def read_record(example: Example, image_size: int, channels: int, resize: str) -> Record:
    """Reads and resizes one example; its image gets `channels` channels."""
    image, mask = _read_files(example, resize)
    image = resize_image(image[..., :channels], image_size, resize)
    return Record(
        id=example.id,
        image=np.broadcast_to(image, (image_size, image_size, channels)),
        mask=resize_mask(mask, image_size, resize),
        full_mask=mask,
        text=example.text,
    )


def _read_files(example: Example, resize: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image and its mask, which is empty if the example has none."""
    image = read_image(example.image_path)
    if not example.mask_path:
        return image, np.zeros((*image.shape[:2], 1), np.uint8)
    return image, read_mask(example.mask_path, resize)


def check_files(source: str, examples: list[Example], resize: str) -> int:
    """Decodes all images and masks before anything is written.

    Args:
      source: Name of the dataset in errors.
      examples: Examples to check.
      resize: Value of `image_io.RESIZE_METHODS`, as in `read_record`.

    Returns:
      1 if all images are greyscale (possibly stored as RGB with equal channels), else 3.

    Raises:
      DataError: Images cannot be read or differ in size from their masks; lists all of them.
    """
    problems = []
    channels = 1
    for example in examples:
        try:
            image, mask = _read_files(example, resize)
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
