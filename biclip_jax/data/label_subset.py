"""Nested label subsets, the same on every machine, by patient if the ids name patients."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biclip_jax.core.errors import UserError

# BIDS names, as in most of QaTa-COV19: sub-S09345_ses-E16849_run-1_...
_PATIENT = re.compile(r"(sub-[A-Za-z0-9]+)_")


def patient_of(image_id: str) -> str:
    """Returns the patient named by an image's id, or the id itself as a separate patient."""
    match = _PATIENT.match(image_id)
    return match.group(1).lower() if match else image_id


def select_rows(ids: Sequence[str], fraction: float, seed: int = 0) -> list[int]:
    """Returns the rows of the labelled subset, ascending.

    Adds whole patients in the order of sha256(f"{seed}:{patient}") until `fraction` of the images
    is reached, so that subsets of the same seed are nested.

    Args:
      ids: Ids of the images of a split.
      fraction: Fraction of the images, above 0 and at most 1.
      seed: Seed of the order.

    Raises:
      UserError: The fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--config.data.label_fraction: {fraction}; expected above 0 and at most 1")
    groups: dict[str, list[int]] = {}
    for row, image_id in enumerate(ids):
        groups.setdefault(patient_of(image_id), []).append(row)
    rows: list[int] = []
    for patient in sorted(groups, key=lambda name: _patient_hash(seed, name)):
        if len(rows) >= fraction * len(ids):
            break
        rows += groups[patient]
    return sorted(rows)


def report(ids: Iterable[str]) -> dict[str, Any]:
    """Returns the content of labels.json for a run's training images: counts and all ids."""
    image_ids = list(ids)
    patients = {patient_of(image_id) for image_id in image_ids}
    return {"num_images": len(image_ids), "num_patients": len(patients), "ids": image_ids}


def read_ids(path: Path) -> list[str]:
    """Reads the ids from a run's labels.json.

    Raises:
      UserError: The file is damaged.
    """
    try:
        return [str(image_id) for image_id in json.loads(path.read_text(encoding="utf-8"))["ids"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); give another --workdir") from error


def _patient_hash(seed: int, patient: str) -> str:
    return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()


def hash_ids(ids: Sequence[str]) -> np.ndarray:
    """Returns (N,) uint32 hashes, from the SHA-256 of each id."""
    digests = (hashlib.sha256(name.encode()).digest()[:4] for name in ids)
    return np.array([int.from_bytes(digest, "big") for digest in digests], np.uint32)
