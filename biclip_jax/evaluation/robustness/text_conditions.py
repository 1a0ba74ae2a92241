"""Text conditions: what the sentences of a split become before the model reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from biclip_jax.core.errors import UserError
from biclip_jax.data import text as text_lib
from biclip_jax.data.annotations import VARIANTS
from biclip_jax.data.schema import Record

DERIVED = ("original", "empty", "shuffled", "swapped")  # from the right sentences
CONDITIONS = (*DERIVED, *VARIANTS)


class ConditionedPrompts(NamedTuple):
    """The sentences of a condition, and the pictures that have one.

    Attributes:
      rows: (M,) int, in the split's order; all of them but for published variants.
      sentences: of these pictures.
    """

    rows: np.ndarray
    prompts: list[str]


def prompt_fields(records: Sequence[Record]) -> list[dict[str, Any]]:
    """id, text and variants of each record: what conditions need, and no picture."""
    photometric: list[dict[str, Any]] = []
    for record in records:
        fields: Mapping[str, Any] = record
        variants = fields.get("variants", {})
        photometric.append({"id": record["id"], "text": record["text"], "variants": variants})
    return photometric


def rows_of(condition: str, prompt_fields: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The rows (M,) of the pictures that have a sentence of the condition."""
    if condition not in VARIANTS:
        return np.arange(len(prompt_fields))
    # A data set that is read without its sentences has no variants of them.
    if not any(one["text"] for one in prompt_fields):
        return np.arange(0)
    return np.flatnonzero([bool(one["variants"].get(condition)) for one in prompt_fields])


def apply_condition(
    condition: str,
    prompt_fields: Sequence[Mapping[str, Any]],
    seed: int = 0,
    split: Sequence[Mapping[str, Any]] | None = None,
) -> ConditionedPrompts | None:
    """The sentences of a text condition; None where the split has none of it.

    right: as they are. missing: empty. shuffled: another image's sentence of the same split, a
    different string; the same one in every subset. mirrored: left and right swapped, the picture
    as it is. contradictory, missing_location, overdescriptive and underdescriptive: as the data set
    brings them, on those pictures that have one.

    Args:
      condition: of `CONDITIONS`.
      spoken: see there.
      seed: of the shuffled ones.
      split: likewise, of the whole split that these pictures are of; None: they are the split.
    """
    rows = rows_of(condition, prompt_fields)
    prompts = [one["text"] for one in prompt_fields]
    made: list[str] | None = prompts
    if condition in VARIANTS:
        made = [prompt_fields[i]["variants"][condition] for i in rows] or None
    elif condition == "empty":
        made = [""] * len(prompts)
    elif condition == "shuffled":
        made = _shuffled(prompt_fields, split, seed)
    elif condition == "swapped":
        made = [text_lib.swap_sides(prompt) for prompt in prompts]
    return None if made is None else ConditionedPrompts(rows, made)


def _shuffled(prompt_fields, split, seed) -> list[str] | None:
    drawn = text_lib.shuffle([one["text"] for one in split or prompt_fields], seed)
    if drawn is None or split is None:
        return drawn
    of_image = {one["id"]: prompt for one, prompt in zip(split, drawn, strict=True)}
    return [of_image[one["id"]] for one in prompt_fields]


def subset(records: Sequence[Record], size: int | None, seed: int = 0) -> Sequence[Record]:
    """`size` fixed pictures, in the order of the SHA-256 of "seed:id": the same on every machine.

    A smaller subset is the beginning of a larger one.

    Args:
      records: of a split.
      size: in pictures; None takes the split as it is.
      seed: of the order.

    Raises:
      UserError: the split is smaller.
    """
    if size is None:
        return records
    if not 0 < size <= len(records):
        raise UserError(
            f"--subset {size}: the split has {len(records)} pictures; expected 1 to that many"
        )

    def order(row: int) -> str:
        return hashlib.sha256(f"{seed}:{ids[row]}".encode()).hexdigest()

    ids = [record["id"] for record in records]
    return [records[row] for row in sorted(range(len(ids)), key=order)[:size]]
