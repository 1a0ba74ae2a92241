"""Text conditions and subsets."""

import hashlib

import pytest

from biclip_jax.data.annotations import VARIANTS
from biclip_jax.errors import UserError
from biclip_jax.evaluation import conditions

RECORDS = [
    {"id": f"p{i}", "text": f"one area, {side} lung.", "image": None}
    for i, side in enumerate(["left", "right", "lower left", "left", "all right"])
]
VARIED = [
    {**record, "variants": {"contradictory": f"no area {i}"} if i != 2 else {}}
    for i, record in enumerate(RECORDS)
]


def sentences(condition, records=RECORDS, seed=0):
    return conditions.ask(condition, conditions.spoken(records), seed)


def test_made_conditions_are_of_every_picture():
    texts = [r["text"] for r in RECORDS]
    assert sentences("right").sentences == texts
    assert sentences("missing").sentences == [""] * 5
    shuffled = sentences("shuffled").sentences
    assert all(a != b and b in texts for a, b in zip(texts, shuffled, strict=True))
    assert shuffled == sentences("shuffled").sentences
    assert sentences("mirrored").sentences[2] == "one area, lower right lung."
    for name in conditions.MADE:
        assert sentences(name).rows.tolist() == [0, 1, 2, 3, 4]


def test_a_pictures_shuffled_sentence_does_not_depend_on_the_subset():
    split = conditions.spoken(RECORDS)
    drawn = conditions.ask("shuffled", split)
    whole = dict(zip([one["id"] for one in split], drawn.sentences, strict=True))
    for size in (1, 2, 5):
        some = conditions.spoken(conditions.subset(RECORDS, size))
        asked = conditions.ask("shuffled", some, split=split)
        assert asked.sentences == [whole[one["id"]] for one in some]
        assert asked.rows.tolist() == list(range(size))


def test_published_variants_are_of_the_pictures_that_have_one():
    assert {"contradictory", "missing_location", "overdescriptive", "underdescriptive"} == set(
        VARIANTS
    )
    found = sentences("contradictory", VARIED)
    assert found.rows.tolist() == [0, 1, 3, 4]
    assert found.sentences == ["no area 0", "no area 1", "no area 3", "no area 4"]
    for name in VARIANTS[1:]:
        assert sentences(name, VARIED) is None
        assert sentences(name) is None


def test_a_split_read_without_its_sentences_has_no_variants_and_nothing_to_shuffle():
    silent = [{**record, "text": ""} for record in VARIED]
    assert sentences("contradictory", silent) is None
    assert sentences("shuffled", silent) is None
    assert sentences("right", silent).sentences == [""] * 5


def test_subset_is_in_the_order_of_the_hashes_and_nested():
    def digest(record):
        return hashlib.sha256(b"0:" + record["id"].encode()).hexdigest()

    expected = sorted(RECORDS, key=digest)
    for size in (1, 3, 5):
        assert conditions.subset(RECORDS, size) == expected[:size]
        assert conditions.subset(RECORDS[::-1], size) == expected[:size]
    assert conditions.subset(RECORDS, None) is RECORDS
    assert conditions.subset(RECORDS, 5, seed=3) != expected
    for size in (6, -1):
        with pytest.raises(UserError, match=r"--subset .*5 pictures"):
            conditions.subset(RECORDS, size)
