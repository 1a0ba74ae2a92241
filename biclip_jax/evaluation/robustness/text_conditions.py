"""Text conditions: how the prompts of a split are changed before the model reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from biclip_jax.core.errors import UserError
from biclip_jax.data import text as text_lib
from biclip_jax.data.annotations import VARIANTS
from biclip_jax.data.schema import Record

DERIVED = ("original", "empty", "shuffled", "swapped")  # derived from the original prompts
CONDITIONS = (*DERIVED, *VARIANTS)


class ConditionedPrompts(NamedTuple):
    """The prompts of a text condition and the images that have one.

    Attributes:
      rows: (M,) int, in the order of the split; all rows except for published variants.
      prompts: One prompt per row.
    """

    rows: np.ndarray
    prompts: list[str]


def prompt_fields(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns id, text and variants of each record, without the image."""
    rows: list[dict[str, Any]] = []
    for record in records:
        fields: Mapping[str, Any] = record
        variants = fields.get("variants", {})
        rows.append({"id": record["id"], "text": record["text"], "variants": variants})
    return rows


def rows_of(condition: str, prompt_fields: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Returns the rows (M,) of the images that have a prompt of the condition."""
    if condition not in VARIANTS:
        return np.arange(len(prompt_fields))
    # A dataset that is read without its prompts has no variants either.
    if not any(fields["text"] for fields in prompt_fields):
        return np.arange(0)
    return np.flatnonzero([bool(fields["variants"].get(condition)) for fields in prompt_fields])


def apply_condition(
    condition: str,
    prompt_fields: Sequence[Mapping[str, Any]],
    seed: int = 0,
    split: Sequence[Mapping[str, Any]] | None = None,
) -> ConditionedPrompts | None:
    """Returns the prompts of a text condition, or None if the split has none.

    original: unchanged. empty: the empty string. shuffled: a different prompt of another image of
    the same split; subsets get the same one. swapped: left and right swapped, the image unchanged.
    contradictory, missing_location, overdescriptive and underdescriptive: the variants of the data
    set, on the images that have one.

    Args:
      condition: One of `CONDITIONS`.
      prompt_fields: See `prompt_fields`.
      seed: Seed of the shuffled prompts.
      split: `prompt_fields` of the whole split if these images are a subset of it.
    """
    rows = rows_of(condition, prompt_fields)
    original = [fields["text"] for fields in prompt_fields]
    prompts: list[str] | None = original
    if condition in VARIANTS:
        prompts = [prompt_fields[i]["variants"][condition] for i in rows] or None
    elif condition == "empty":
        prompts = [""] * len(original)
    elif condition == "shuffled":
        prompts = _shuffled(prompt_fields, split, seed)
    elif condition == "swapped":
        prompts = [text_lib.swap_sides(prompt) for prompt in original]
    return None if prompts is None else ConditionedPrompts(rows, prompts)


def _shuffled(prompt_fields, split, seed) -> list[str] | None:
    shuffled = text_lib.shuffle([fields["text"] for fields in split or prompt_fields], seed)
    if shuffled is None or split is None:
        return shuffled
    by_id = {fields["id"]: prompt for fields, prompt in zip(split, shuffled, strict=True)}
    return [by_id[fields["id"]] for fields in prompt_fields]


def subset(records: Sequence[Record], size: int | None, seed: int = 0) -> Sequence[Record]:
    """Selects `size` images in the order of the SHA-256 of "seed:id", the same on every machine.

    A smaller subset is a prefix of a larger one.

    Args:
      records: Records of a split.
      size: Number of images; None returns the split unchanged.
      seed: Seed of the order.

    Raises:
      UserError: The split is smaller than `size`.
    """
    if size is None:
        return records
    if not 0 < size <= len(records):
        raise UserError(
            f"--subset {size}: the split has {len(records)} images; expected 1 to {len(records)}"
        )

    def order(row: int) -> str:
        return hashlib.sha256(f"{seed}:{ids[row]}".encode()).hexdigest()

    ids = [record["id"] for record in records]
    return [records[row] for row in sorted(range(len(ids)), key=order)[:size]]
