"""Half-mix augmentation: parsing prompts, and mixing samples."""

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
def test_parsing_and_composing_a_prompt_round_trips(prompt, left, right):
    parsed = half_mix.parse_prompt(prompt)
    assert parsed == (left, right)
    composed = half_mix.compose_prompt(*parsed)
    assert composed.lower().rstrip(".") == prompt.lower().rstrip(".")


@pytest.mark.parametrize(
    "prompt", ["", "a polyp in the upper left", "Bilateral pulmonary infection.", f"{BOTH} Also."]
)
def test_other_wordings_are_not_parsed(prompt):
    assert half_mix.parse_prompt(prompt) is None


def record(name, values, text):
    """Returns a record whose image has two rows, with the given column values."""
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


def test_prompts_of_mixed_samples_describe_their_halves():
    samples = half_mix.add_mixed_samples(RECORDS, 60, seed=0)
    assert samples[:180] == RECORDS * 60
    observed = set()
    for sample in samples[180:]:
        assert sample["image"].shape == (2, 4, 1) and sample["image"].dtype == np.uint8
        np.testing.assert_array_equal(sample["mask"], sample["image"] % 2)
        row = tuple(sample["image"][0, :, 0].tolist())
        assert row[0] // 10 != row[2] // 10  # from two images
        named = [NAMED[half] for half in (row[:2], row[2:]) if half in NAMED]
        assert sample["text"].endswith(", " + " and ".join(f"{name} lung" for name in named) + ".")
        observed |= {row[:2], row[2:]}
    assert observed >= NAMED.keys()


def test_partners_depend_on_the_seed_and_zero_repetitions_change_nothing():
    names = [
        [sample["id"] for sample in half_mix.add_mixed_samples(RECORDS, 5, seed)][15:]
        for seed in (1, 1, 2)
    ]
    assert names[0] == names[1] != names[2]
    assert half_mix.add_mixed_samples(RECORDS, 0, 1) is RECORDS


def test_rejects_prompts_of_another_wording():
    others = [*RECORDS[:1], record("d", 1, "a polyp")]
    with pytest.raises(UserError, match=r"data\.half_mix: 1 of 2 prompts have the wording"):
        half_mix.add_mixed_samples(others, 1, 0)
