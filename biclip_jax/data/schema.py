"""What travels through the data code: examples on disk, records, batches."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict

import numpy as np

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Example(NamedTuple):
    """One line of a data set as it lies on disk; nothing is read yet.

    Attributes:
      id: unique within the data set: the picture's file name without suffix.
      split: "train", "val" or "test".
      image_path: the picture.
      mask_path: its mask; empty where it has none and needs none.
      text: the sentence, stripped; may be empty.
    """

    id: str
    split: Split
    image_path: str
    mask_path: str
    text: str


class Record(TypedDict):
    """One prepared example on the host.

    Attributes:
      id: the example's id.
      image: (S, S, C) uint8, C = 1 (grey) or 3 (RGB).
      mask: (S, S, 1) uint8 in {0, 1}.
      full_mask: (H, W, 1) uint8 in {0, 1}, the mask at its own size.
      text: the sentence.
    """

    id: str
    image: np.ndarray
    mask: np.ndarray
    full_mask: np.ndarray
    text: str


class Batch(TypedDict, total=False):
    """B examples stacked; B is this host's share of the global batch.

    Attributes:
      image: (B, S, S, C) uint8.
      mask: (B, S, S, 1) uint8 in {0, 1}.
      text_ids: (B, L) int32, padded.
      text_mask: (B, L) bool, true where a token is.
      text_features: (B, D) float32, a frozen tower's vector, in place of ids and mask.
      has_text: (B,) bool, false where the sentence is empty.
      mirrored_text_ids, mirrored_text_mask, mirrored_text_features, mirrored_has_text:
        the mirrored sentence, likewise.
      labelled: (B,) bool, false where the mask is not known: empty, or the teachers'.
      row: (B,) int32, the row in the global batch; random keys fold it in.
      index: (B,) int32, the row in the split.
      image_hash: (B,) uint32, of the picture's id; damage and samples are drawn from it.
      valid: (B,) bool, false where the row only fills the batch.
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
