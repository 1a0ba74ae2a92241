"""Types of the input pipeline: examples on disk, prepared records, batches."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict

import numpy as np

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Example(NamedTuple):
    """One annotated image on disk; its files are not read yet.

    Attributes:
      id: Unique within the dataset: the image's file name without suffix.
      split: "train", "val" or "test".
      image_path: Path of the image.
      mask_path: Path of its mask; "" if the image has none and needs none.
      text: Text prompt, stripped; may be empty.
    """

    id: str
    split: Split
    image_path: str
    mask_path: str
    text: str


class Record(TypedDict):
    """One prepared example on the host.

    Attributes:
      id: Id of the example.
      image: (S, S, C) uint8, C = 1 (greyscale) or 3 (RGB).
      mask: (S, S, 1) uint8 in {0, 1}.
      full_mask: (H, W, 1) uint8 in {0, 1}, the mask at its original size.
      text: Text prompt.
    """

    id: str
    image: np.ndarray
    mask: np.ndarray
    full_mask: np.ndarray
    text: str


class Batch(TypedDict, total=False):
    """A stack of B examples, where B is this host's share of the global batch.

    Attributes:
      image: (B, S, S, C) uint8.
      mask: (B, S, S, 1) uint8 in {0, 1}.
      text_ids: (B, L) int32, padded.
      text_mask: (B, L) bool, true at tokens.
      text_features: (B, D) float32, embeddings of a frozen text encoder, instead of ids and mask.
      has_text: (B,) bool, false for an empty prompt.
      swapped_text_ids, swapped_text_mask, swapped_text_features, swapped_has_text:
        The same for the left-right swapped prompt.
      labelled: (B,) bool, false if the mask is not ground truth: empty, or a pseudo-label.
      row: (B,) int32, row in the global batch; random keys fold it in.
      index: (B,) int32, row in the split.
      image_hash: (B,) uint32, hash of the image's id; seeds its corruptions and samples.
      valid: (B,) bool, false for padding rows.
    """

    image: np.ndarray
    mask: np.ndarray
    text_ids: np.ndarray
    text_mask: np.ndarray
    text_features: np.ndarray
    has_text: np.ndarray
    swapped_text_ids: np.ndarray
    swapped_text_mask: np.ndarray
    swapped_text_features: np.ndarray
    swapped_has_text: np.ndarray
    labelled: np.ndarray
    row: np.ndarray
    index: np.ndarray
    image_hash: np.ndarray
    valid: np.ndarray
