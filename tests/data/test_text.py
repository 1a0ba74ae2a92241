"""Sentences: vocabulary, ids, mirroring, shuffling."""

import warnings

import numpy as np
import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.data import text, tokenizers

SENTENCES = [
    "Bilateral pulmonary infection, two infected areas, lower left lung and upper right lung.",
    "unilateral pulmonary infection, one infected area, lower right lung.",
]


def test_the_vocabulary_is_the_sorted_words_whatever_the_order():
    first = text.build_tokenizer(SENTENCES)
    again = text.build_tokenizer(SENTENCES[::-1] * 3)
    assert first.get_vocab() == again.get_vocab()
    words = sorted(first.get_vocab(), key=first.get_vocab().get)
    assert words[:3] == ["[PAD]", "[UNK]", "[CLS]"]
    assert words[3:] == sorted(words[3:])
    assert "bilateral" in words


def test_encode_puts_cls_first_pads_and_masks():
    tokenizer = text.build_tokenizer(SENTENCES)
    ids, mask = text.encode(tokenizer, ["Lower LEFT lung", "", "zebra lung"], 6)
    vocabulary = tokenizer.get_vocab()
    words = [vocabulary[w] for w in ("[CLS]", "lower", "left", "lung")]
    assert ids[0].tolist() == [*words, 0, 0]
    assert mask[0].tolist() == [True] * 4 + [False] * 2
    assert ids[1].tolist() == [vocabulary["[CLS]"], 0, 0, 0, 0, 0]
    assert mask.sum(1).tolist() == [4, 1, 3]
    assert ids[2, 1] == vocabulary["[UNK]"]
    assert ids.dtype == np.int32


def test_fields_say_whether_there_is_a_sentence():
    tokenizer, texts = text.build_tokenizer(SENTENCES), ["left lung", "", "  "]
    fields = text.encode_fields(tokenizer, texts, 4)
    ids, mask = text.encode(tokenizer, texts, 4)
    assert fields["has_text"].tolist() == [True, False, False]
    np.testing.assert_array_equal(fields["text_ids"], ids)
    np.testing.assert_array_equal(fields["text_mask"], mask)
    vectors = {prompt: np.full(3, len(prompt), np.float32) for prompt in texts}
    found = text.feature_fields(vectors, texts[::-1])
    assert found["has_text"].tolist() == [False, False, True]
    assert found["text_features"][:, 0].tolist() == [2, 0, 9]


def test_encode_cuts_what_is_too_long():
    ids, mask = text.encode(text.build_tokenizer(SENTENCES), SENTENCES, 5)
    assert ids.shape == (2, 5)
    assert mask.all()


def test_a_cut_sentence_is_the_beginning_of_the_whole_one():
    tokenizer = text.build_tokenizer(SENTENCES)
    whole, _ = text.encode(tokenizer, SENTENCES, 40)
    for length in (1, 2, 5, 39):
        ids, _ = text.encode(tokenizer, SENTENCES, length)
        np.testing.assert_array_equal(ids, whole[:, :length])


def test_a_sentence_that_just_fits_is_whole_and_of_no_concern():
    tokenizer = text.build_tokenizer(SENTENCES)
    _, mask = text.encode(tokenizer, ["lower left lung"] * 2, 4)
    assert mask.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.warn_truncated(tokenizer, ["lower left lung"] * 2, 4)


def test_distinct_sentences_that_are_too_long_are_counted_in_a_warning():
    tokenizer = text.build_tokenizer(SENTENCES)
    with pytest.warns(UserWarning, match="2 of 3 sentences are longer than 5 tokens"):
        text.warn_truncated(tokenizer, [*SENTENCES, *SENTENCES, "left lung"], 5)


def test_a_length_without_room_for_the_special_tokens_is_refused():
    with pytest.raises(UserError, match="max_length: found 0; expected at least 1"):
        text.encode(text.build_tokenizer(SENTENCES), SENTENCES, 0)


def test_unknown_words_are_found_as_they_stand_in_the_sentence():
    tokenizer = text.build_tokenizer(SENTENCES)
    prompts = ["Lower left lung", "a Zebra in the lower lung"]
    assert text.unknown_words(tokenizer, prompts) == ["Zebra", "a", "in", "the"]


def test_save_and_load_give_the_same_ids(tmp_path):
    tokenizer = text.build_tokenizer(SENTENCES)
    tokenizer.save(str(tmp_path / tokenizers.TOKENIZER_FILE))
    loaded = tokenizers.load_tokenizer(tmp_path)
    for a, b in zip(
        text.encode(tokenizer, SENTENCES, 32), text.encode(loaded, SENTENCES, 32), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("content", [None, "", "{}", "not json"])
def test_a_missing_or_damaged_tokenizer_names_its_file(tmp_path, content):
    if content is not None:
        (tmp_path / tokenizers.TOKENIZER_FILE).write_text(content)
    with pytest.raises(UserError, match=tokenizers.TOKENIZER_FILE):
        tokenizers.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "swapped"),
    [
        (
            "two infected areas, lower left lung and upper middle right lung.",
            "two infected areas, upper middle left lung and lower right lung.",
        ),
        ("all left lung and all right lung.", "all left lung and all right lung."),
        ("one infected area, Lower LEFT lung.", "one infected area, Lower RIGHT lung."),
        ("the lower left lung and the right lung", "the left lung and the lower right lung"),
        ("a polyp at the top left of the image", "a polyp at the top right of the image"),
        ("all left and upper right lung", "upper left and all right lung"),
        ("leftover brightness", "leftover brightness"),
        ("", ""),
    ],
)
def test_mirror_swaps_sides_and_keeps_the_left_first(prompt, swapped):
    assert text.swap_sides(prompt) == swapped
    assert text.swap_sides(swapped) == prompt


def test_shuffle_gives_each_row_another_string_of_the_split_by_seed():
    prompts = ["a", "b", "a", "c"] * 25
    shuffled = text.shuffle(prompts, seed=3)
    assert all(x != y for x, y in zip(prompts, shuffled, strict=True))
    assert set(shuffled) <= set(prompts)
    assert shuffled == text.shuffle(prompts, seed=3)
    assert shuffled != text.shuffle(prompts, seed=4)
    assert text.shuffle(["a", "a"], seed=0) is None
