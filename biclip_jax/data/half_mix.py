"""Half-mix augmentation: training samples made of the halves of two images, with their prompts.

Prompts in LViT's wording describe the left and the right half of an image separately. Joining the
left half of one image and the right half of another therefore gives an image with a known prompt,
which may be missing from the labelled subset.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from biclip_jax.core.errors import UserError
from biclip_jax.data.schema import Record

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
_LOCATION = r"((?:(?:all|upper|middle|lower) )+)"
_PROMPT = re.compile(
    rf"(?:unilateral|bilateral) pulmonary infection, ({'|'.join(NUMBERS)}) infected areas?, "
    rf"(?:{_LOCATION}left lung)?(?: and )?(?:{_LOCATION}right lung)?\.?",
    re.IGNORECASE,
)


class HalfFindings(NamedTuple):
    """Findings in one half: a location such as "upper middle", and the number of areas."""

    location: str
    areas: int


def parse_prompt(prompt: str) -> tuple[HalfFindings | None, HalfFindings | None] | None:
    """Parses a prompt into the findings of the left and right half.

    A prompt states only the total number of areas. "upper lower" counts as two and other locations
    as one; the remainder is assigned to the side with more locations.

    Returns:
      (left, right), with None for a half that is not named; None for any other wording.
    """
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        return None
    number, *locations = match.groups(default="")
    left, right = (words.lower().split() for words in locations)
    total = NUMBERS.index(number.lower())
    if not left or not right:
        named = HalfFindings(" ".join(left or right), max(total, 1))
        return (named, None) if left else (None, named) if right else None
    counts = [2 if words == ["upper", "lower"] else 1 for words in (left, right)]
    counts[len(right) > len(left)] += max(total - sum(counts), 0)
    return HalfFindings(" ".join(left), counts[0]), HalfFindings(" ".join(right), counts[1])


def compose_prompt(left: HalfFindings | None, right: HalfFindings | None) -> str:
    """Returns the prompt of two halves, of which at least one is not None."""
    named = [(half, side) for half, side in ((left, "left"), (right, "right")) if half]
    count = min(sum(half.areas for half, _ in named), len(NUMBERS) - 1)
    sides = "Bilateral" if len(named) == 2 else "Unilateral"
    areas = f"{NUMBERS[count]} infected area{'s' * (count > 1)}"
    locations = " and ".join(f"{half.location} {side} lung" for half, side in named)
    return f"{sides} pulmonary infection, {areas}, {locations}."


def add_mixed_samples(records: Sequence[Record], times: int, seed: int) -> Sequence[Record]:
    """Returns the records repeated `times` times, plus up to as many mixed samples.

    Args:
      records: Labelled records.
      times: Number of repetitions; 0 returns the records unchanged.
      seed: Seed of the partners, which are redrawn in each repetition.

    Raises:
      UserError: Fewer than two prompts have LViT's wording.
    """
    if not times:
        return records
    records = list(records)
    parsed = [(record, halves) for record in records if (halves := parse_prompt(record["text"]))]
    if len(parsed) < 2:
        raise UserError(
            f"--config.data.half_mix: {len(parsed)} of {len(records)} prompts have the wording "
            "'Bilateral pulmonary infection, two infected areas, lower left lung and upper right "
            "lung.', but mixing needs two; set it to 0"
        )
    rng, mixed = np.random.default_rng(seed), []
    for _ in range(times):
        for i, j in enumerate(rng.permutation(len(parsed))):
            (first, (left, _)), (second, (_, right)) = parsed[i], parsed[j]
            if i != j and (left or right):
                mixed.append(_mix(first, second, compose_prompt(left, right)))
    return records * times + mixed


def _mix(first: Record, second: Record, text: str) -> Record:
    mask = _join_halves(first["mask"], second["mask"])
    return Record(
        id=f"{first['id']}+{second['id']}",
        image=_join_halves(first["image"], second["image"]),
        mask=mask,
        full_mask=mask,
        text=text,
    )


def _join_halves(left, right):
    middle = left.shape[1] // 2
    return np.concatenate([left[:, :middle], right[:, middle:]], axis=1)
