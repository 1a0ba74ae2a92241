"""Label subsets: nested, the same on every machine, by patient where ids tell the patient."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biclip_jax.core.errors import UserError

# BIDS names, as most of QaTa-COV19's are: sub-S09345_ses-E16849_run-1_...
_PATIENT = re.compile(r"(sub-[A-Za-z0-9]+)_")


def patient_of(image_id: str) -> str:
    """The patient that an image's id names, or the id itself: a patient of its own."""
    found = _PATIENT.match(image_id)
    return found.group(1).lower() if found else image_id


def select_rows(ids: Sequence[str], fraction: float, seed: int = 0) -> list[int]:
    """Rows of the labelled share, ascending.

    Whole patients are taken in the order of sha256(f"{seed}:{patient}") until
    `fraction` of the images is reached, so that a smaller share lies inside
    every larger one of the same seed.

    Args:
      ids: of the images of a split.
      fraction: above 0, at most 1.
      seed: of the order.

    Raises:
      UserError: another fraction.
    """
    if not 0 < fraction <= 1:
        raise UserError(
            f"--config.data.label_fraction: {fraction}; expected a share above 0, at most 1"
        )
    groups: dict[str, list[int]] = {}
    for row, image_id in enumerate(ids):
        groups.setdefault(patient_of(image_id), []).append(row)
    rows: list[int] = []
    for patient in sorted(groups, key=lambda name: _order(seed, name)):
        if len(rows) >= fraction * len(ids):
            break
        rows += groups[patient]
    return sorted(rows)


def report(ids: Iterable[str]) -> dict[str, Any]:
    """What labels.json says of the pictures that a run trains on: counts, and every id."""
    chosen = list(ids)
    patients = {patient_of(image_id) for image_id in chosen}
    return {"num_images": len(chosen), "num_patients": len(patients), "ids": chosen}


def read_ids(path: Path) -> list[str]:
    """The ids in a run's labels.json.

    Raises:
      UserError: the file is damaged.
    """
    try:
        return [str(image_id) for image_id in json.loads(path.read_text(encoding="utf-8"))["ids"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); give another run") from error


def _order(seed: int, patient: str) -> str:
    return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()


def hash_ids(ids: Sequence[str]) -> np.ndarray:
    """(N,) uint32, from the SHA-256 of each id."""
    digests = (hashlib.sha256(name.encode()).digest()[:4] for name in ids)
    return np.array([int.from_bytes(digest, "big") for digest in digests], np.uint32)
