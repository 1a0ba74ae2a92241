"""Pictures of two halves: what sentences say of each, and what is put together."""

import numpy as np
import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.data import half_mix

BOTH = "Bilateral pulmonary infection, two infected areas, lower left lung and upper right lung."
LEFT = "Unilateral pulmonary infection, one infected area, middle lower left lung."
RIGHT = "unilateral pulmonary infection, two infected areas, upper lower right lung"


@pytest.mark.parametrize(
    ("prompt", "left", "right"),
    [
        (BOTH, ("lower", 1), ("upper", 1)),
        (LEFT, ("middle lower", 1), None),
        (RIGHT, None, ("upper lower", 2)),
        (
            "bilateral pulmonary infection, three infected areas, "
            "upper lower left lung and all right lung.",
            ("upper lower", 2),
            ("all", 1),
        ),
        (
            "Bilateral pulmonary infection, four infected areas, "
            "middle left lung and upper middle lower right lung.",
            ("middle", 1),
            ("upper middle lower", 3),
        ),
    ],
)
def test_a_sentence_names_its_halves_and_says_the_same_again(prompt, left, right):
    found = half_mix.parse_prompt(prompt)
    assert found == (left, right)
    again = half_mix.compose_prompt(*found)
    assert again.lower().rstrip(".") == prompt.lower().rstrip(".")


@pytest.mark.parametrize(
    "prompt", ["", "a polyp in the upper left", "Bilateral pulmonary infection.", f"{BOTH} Also."]
)
def test_other_wordings_have_no_halves(prompt):
    assert half_mix.parse_prompt(prompt) is None


def record(name, values, text):
    """A picture of two rows, whose columns have the values."""
    image = np.array(2 * [values], np.uint8)[..., None]
    return {"id": name, "image": image, "mask": image % 2, "full_mask": image % 2, "text": text}


RECORDS = [
    record("a", (10, 11, 12, 13), BOTH),
    record("b", (20, 21, 22, 23), LEFT),
    record("c", (30, 31, 32, 33), RIGHT),
]
NAMED = {
    (10, 11): "lower left",
    (12, 13): "upper right",
    (20, 21): "middle lower left",
    (32, 33): "upper lower right",
}


def test_composed_pictures_have_the_halves_that_their_sentences_say():
    found = half_mix.add_mixed_samples(RECORDS, 60, seed=0)
    assert found[:180] == RECORDS * 60
    seen = set()
    for one in found[180:]:
        assert one["image"].shape == (2, 4, 1) and one["image"].dtype == np.uint8
        np.testing.assert_array_equal(one["mask"], one["image"] % 2)
        row = tuple(one["image"][0, :, 0].tolist())
        assert row[0] // 10 != row[2] // 10  # of two pictures
        named = [NAMED[half] for half in (row[:2], row[2:]) if half in NAMED]
        assert one["text"].endswith(", " + " and ".join(f"{name} lung" for name in named) + ".")
        seen |= {row[:2], row[2:]}
    assert seen >= NAMED.keys()


def test_partners_follow_the_seed_and_none_are_drawn_where_none_are_wanted():
    names = [
        [one["id"] for one in half_mix.add_mixed_samples(RECORDS, 5, seed)][15:]
        for seed in (1, 1, 2)
    ]
    assert names[0] == names[1] != names[2]
    assert half_mix.add_mixed_samples(RECORDS, 0, 1) is RECORDS


def test_sentences_of_another_wording_are_told_of():
    others = [*RECORDS[:1], record("d", 1, "a polyp")]
    with pytest.raises(UserError, match=r"data\.half_mix: 1 of 2 sentences are of the wording"):
        half_mix.add_mixed_samples(others, 1, 0)
