"""Text prompts: vocabulary, ids, left-right swap, shuffling."""

import warnings

import numpy as np
import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.data import text, tokenizers

PROMPTS = [
    "Bilateral pulmonary infection, two infected areas, lower left lung and upper right lung.",
    "unilateral pulmonary infection, one infected area, lower right lung.",
]


def test_vocabulary_is_sorted_and_independent_of_the_order():
    tokenizer = text.build_tokenizer(PROMPTS)
    reordered = text.build_tokenizer(PROMPTS[::-1] * 3)
    assert tokenizer.get_vocab() == reordered.get_vocab()
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert words[:3] == ["[PAD]", "[UNK]", "[CLS]"]
    assert words[3:] == sorted(words[3:])
    assert "bilateral" in words


def test_encode_puts_cls_first_pads_and_masks():
    tokenizer = text.build_tokenizer(PROMPTS)
    ids, mask = text.encode(tokenizer, ["Lower LEFT lung", "", "zebra lung"], 6)
    vocabulary = tokenizer.get_vocab()
    words = [vocabulary[w] for w in ("[CLS]", "lower", "left", "lung")]
    assert ids[0].tolist() == [*words, 0, 0]
    assert mask[0].tolist() == [True] * 4 + [False] * 2
    assert ids[1].tolist() == [vocabulary["[CLS]"], 0, 0, 0, 0, 0]
    assert mask.sum(1).tolist() == [4, 1, 3]
    assert ids[2, 1] == vocabulary["[UNK]"]
    assert ids.dtype == np.int32


def test_has_text_is_false_for_empty_prompts():
    tokenizer, texts = text.build_tokenizer(PROMPTS), ["left lung", "", "  "]
    fields = text.encode_fields(tokenizer, texts, 4)
    ids, mask = text.encode(tokenizer, texts, 4)
    assert fields["has_text"].tolist() == [True, False, False]
    np.testing.assert_array_equal(fields["text_ids"], ids)
    np.testing.assert_array_equal(fields["text_mask"], mask)
    vectors = {prompt: np.full(3, len(prompt), np.float32) for prompt in texts}
    fields = text.feature_fields(vectors, texts[::-1])
    assert fields["has_text"].tolist() == [False, False, True]
    assert fields["text_features"][:, 0].tolist() == [2, 0, 9]


def test_encode_truncates_long_prompts():
    ids, mask = text.encode(text.build_tokenizer(PROMPTS), PROMPTS, 5)
    assert ids.shape == (2, 5)
    assert mask.all()


def test_truncated_ids_are_a_prefix_of_the_full_ids():
    tokenizer = text.build_tokenizer(PROMPTS)
    full_ids, _ = text.encode(tokenizer, PROMPTS, 40)
    for length in (1, 2, 5, 39):
        ids, _ = text.encode(tokenizer, PROMPTS, length)
        np.testing.assert_array_equal(ids, full_ids[:, :length])


def test_a_prompt_of_max_length_is_complete_and_gives_no_warning():
    tokenizer = text.build_tokenizer(PROMPTS)
    _, mask = text.encode(tokenizer, ["lower left lung"] * 2, 4)
    assert mask.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.warn_truncated(tokenizer, ["lower left lung"] * 2, 4)


def test_warning_counts_distinct_long_prompts():
    tokenizer = text.build_tokenizer(PROMPTS)
    with pytest.warns(UserWarning, match="2 of 3 prompts are longer than 5 tokens"):
        text.warn_truncated(tokenizer, [*PROMPTS, *PROMPTS, "left lung"], 5)


def test_rejects_max_length_below_the_special_tokens():
    with pytest.raises(UserError, match="max_length: found 0; expected at least 1"):
        text.encode(text.build_tokenizer(PROMPTS), PROMPTS, 0)


def test_unknown_words_keep_their_case():
    tokenizer = text.build_tokenizer(PROMPTS)
    prompts = ["Lower left lung", "a Zebra in the lower lung"]
    assert text.unknown_words(tokenizer, prompts) == ["Zebra", "a", "in", "the"]


def test_saved_and_loaded_tokenizer_give_the_same_ids(tmp_path):
    tokenizer = text.build_tokenizer(PROMPTS)
    tokenizer.save(str(tmp_path / tokenizers.TOKENIZER_FILE))
    loaded = tokenizers.load_tokenizer(tmp_path)
    for a, b in zip(
        text.encode(tokenizer, PROMPTS, 32), text.encode(loaded, PROMPTS, 32), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("content", [None, "", "{}", "not json"])
def test_error_for_a_missing_or_damaged_tokenizer_names_its_file(tmp_path, content):
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
def test_swap_sides_is_an_involution_and_names_left_first(prompt, swapped):
    assert text.swap_sides(prompt) == swapped
    assert text.swap_sides(swapped) == prompt


def test_shuffle_gives_each_row_a_different_prompt_by_seed():
    prompts = ["a", "b", "a", "c"] * 25
    shuffled = text.shuffle(prompts, seed=3)
    assert all(x != y for x, y in zip(prompts, shuffled, strict=True))
    assert set(shuffled) <= set(prompts)
    assert shuffled == text.shuffle(prompts, seed=3)
    assert shuffled != text.shuffle(prompts, seed=4)
    assert text.shuffle(["a", "a"], seed=0) is None
