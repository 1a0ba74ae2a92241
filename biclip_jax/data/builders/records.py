"""Encoding and decoding of a Record in a TFDS dataset, and its features.

Images and masks are stored as lossless PNG. Pillow encodes and decodes them, because TFDS can
encode arrays only with TensorFlow.
"""

from __future__ import annotations

import io
import json
from typing import Any

from biclip_jax.data.image_io import decode_png, encode_png
from biclip_jax.data.schema import Record


class RecordWithVariants(Record, total=False):
    """A Record with the published prompt variants of its image.

    Attributes:
      variants: {name in `annotations.VARIANTS`: prompt}; only those in the dataset.
    """

    variants: dict[str, str]


IMAGE_FIELDS = ("image", "mask", "full_mask")


def features(image_size: int, channels: int) -> Any:
    """Returns the TFDS features of a dataset of (S, S, C) images, see `schema.Record`."""
    import tensorflow_datasets as tfds

    size = image_size
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(size, size, channels), encoding_format="png"),
            "mask": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
            "full_mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "text": tfds.features.Text(),
            # JSON, because a TFDS dict would give every image every key.
            "variants": tfds.features.Text(),
        }
    )


def encode(record: RecordWithVariants) -> dict[str, Any]:
    """Returns the example that a TFDS generator yields for a record."""
    example: dict[str, Any] = dict(record)
    example["variants"] = json.dumps(record.get("variants", {}), sort_keys=True)
    return example | {name: io.BytesIO(encode_png(example[name])) for name in IMAGE_FIELDS}


def decode(example: dict[str, Any]) -> RecordWithVariants:
    """Returns the record of an example whose images are PNG bytes."""
    return RecordWithVariants(
        id=example["id"].decode(),
        image=decode_png(example["image"]),
        mask=decode_png(example["mask"]),
        full_mask=decode_png(example["full_mask"]),
        text=example["text"].decode(),
        variants=json.loads(example["variants"]),
    )
