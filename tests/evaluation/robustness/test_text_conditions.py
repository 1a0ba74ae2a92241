"""Text conditions and subsets of a split."""

import hashlib

import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.data.annotations import VARIANTS
from biclip_jax.evaluation.robustness import text_conditions

RECORDS = [
    {"id": f"p{i}", "text": f"one area, {side} lung.", "image": None}
    for i, side in enumerate(["left", "original", "lower left", "left", "all right"])
]
VARIED = [
    {**record, "variants": {"contradictory": f"no area {i}"} if i != 2 else {}}
    for i, record in enumerate(RECORDS)
]


def prompts(condition, records=RECORDS, seed=0):
    return text_conditions.apply_condition(condition, text_conditions.prompt_fields(records), seed)


def test_derived_conditions_apply_to_every_image():
    texts = [r["text"] for r in RECORDS]
    assert prompts("original").prompts == texts
    assert prompts("empty").prompts == [""] * 5
    shuffled = prompts("shuffled").prompts
    assert all(a != b and b in texts for a, b in zip(texts, shuffled, strict=True))
    assert shuffled == prompts("shuffled").prompts
    assert prompts("swapped").prompts[2] == "one area, lower right lung."
    for name in text_conditions.DERIVED:
        assert prompts(name).rows.tolist() == [0, 1, 2, 3, 4]


def test_shuffled_prompts_do_not_depend_on_the_subset():
    split = text_conditions.prompt_fields(RECORDS)
    shuffled = text_conditions.apply_condition("shuffled", split)
    prompt_by_id = dict(zip([fields["id"] for fields in split], shuffled.prompts, strict=True))
    for size in (1, 2, 5):
        some = text_conditions.prompt_fields(text_conditions.subset(RECORDS, size))
        conditioned = text_conditions.apply_condition("shuffled", some, split=split)
        assert conditioned.prompts == [prompt_by_id[fields["id"]] for fields in some]
        assert conditioned.rows.tolist() == list(range(size))


def test_published_variants_apply_to_the_images_that_have_one():
    assert {"contradictory", "missing_location", "overdescriptive", "underdescriptive"} == set(
        VARIANTS
    )
    conditioned = prompts("contradictory", VARIED)
    assert conditioned.rows.tolist() == [0, 1, 3, 4]
    assert conditioned.prompts == ["no area 0", "no area 1", "no area 3", "no area 4"]
    for name in VARIANTS[1:]:
        assert prompts(name, VARIED) is None
        assert prompts(name) is None


def test_a_split_without_prompts_has_no_variants_and_no_shuffled_condition():
    without_text = [{**record, "text": ""} for record in VARIED]
    assert prompts("contradictory", without_text) is None
    assert prompts("shuffled", without_text) is None
    assert prompts("original", without_text).prompts == [""] * 5


def test_subsets_are_nested_and_ordered_by_hash():
    def digest(record):
        return hashlib.sha256(b"0:" + record["id"].encode()).hexdigest()

    expected = sorted(RECORDS, key=digest)
    for size in (1, 3, 5):
        assert text_conditions.subset(RECORDS, size) == expected[:size]
        assert text_conditions.subset(RECORDS[::-1], size) == expected[:size]
    assert text_conditions.subset(RECORDS, None) is RECORDS
    assert text_conditions.subset(RECORDS, 5, seed=3) != expected
    for size in (6, -1):
        with pytest.raises(UserError, match=r"--subset .*5 images"):
            text_conditions.subset(RECORDS, size)
