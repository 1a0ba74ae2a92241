"""Training pictures composed of two halves, and their sentences.

A sentence of LViT's wording names the left and the right half of the picture in turn. The left half
of one picture beside the right half of another is a picture whose sentence is known, too: one that
may not be among those that were labelled.
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
    """What a sentence says of one half: where, such as "upper middle", and how many areas."""

    place: str
    areas: int


def parse_prompt(prompt: str) -> tuple[HalfFindings | None, HalfFindings | None] | None:
    """The left and the right half, None for one that is not named; None for other wordings.

    How many of the areas lie on which side is not said: "upper lower" are two, other places one,
    and what is left over lies where more is named.
    """
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        return None
    number, *places = match.groups(default="")
    left, right = (place.lower().split() for place in places)
    total = NUMBERS.index(number.lower())
    if not left or not right:
        named = HalfFindings(" ".join(left or right), max(total, 1))
        return (named, None) if left else (None, named) if right else None
    counts = [2 if place == ["upper", "lower"] else 1 for place in (left, right)]
    counts[len(right) > len(left)] += max(total - sum(counts), 0)
    return HalfFindings(" ".join(left), counts[0]), HalfFindings(" ".join(right), counts[1])


def compose_prompt(left: HalfFindings | None, right: HalfFindings | None) -> str:
    """The sentence of both halves; at least one is not None."""
    named = [(half, side) for half, side in ((left, "left"), (right, "right")) if half]
    count = min(sum(half.areas for half, _ in named), len(NUMBERS) - 1)
    sides = "Bilateral" if len(named) == 2 else "Unilateral"
    areas = f"{NUMBERS[count]} infected area{'s' * (count > 1)}"
    places = " and ".join(f"{half.place} {side} lung" for half, side in named)
    return f"{sides} pulmonary infection, {areas}, {places}."


def add_mixed_samples(records: Sequence[Record], times: int, seed: int) -> Sequence[Record]:
    """The records `times` over, and as many composed ones of each: half of what training meets.

    Args:
      records: labelled.
      times: 0 changes nothing.
      seed: of the partners, drawn anew each time.

    Raises:
      UserError: not even two sentences are of the wording.
    """
    if not times:
        return records
    records = list(records)
    known = [(one, found) for one in records if (found := parse_prompt(one["text"]))]
    if len(known) < 2:
        raise UserError(
            f"--config.data.half_mix: {len(known)} of {len(records)} sentences are of the wording "
            "'Bilateral pulmonary infection, two infected areas, lower left lung and upper right "
            "lung.', and two make a picture; set it to 0"
        )
    rng, made = np.random.default_rng(seed), []
    for _ in range(times):
        for i, j in enumerate(rng.permutation(len(known))):
            (first, (left, _)), (second, (_, right)) = known[i], known[j]
            if i != j and (left or right):
                made.append(_beside(first, second, compose_prompt(left, right)))
    return records * times + made


def _beside(first: Record, second: Record, text: str) -> Record:
    mask = _joined(first["mask"], second["mask"])
    return Record(
        id=f"{first['id']}+{second['id']}",
        image=_joined(first["image"], second["image"]),
        mask=mask,
        full_mask=mask,
        text=text,
    )


def _joined(left, right):
    middle = left.shape[1] // 2
    return np.concatenate([left[:, :middle], right[:, middle:]], axis=1)
