"""Text prompts: word-level tokenizers, token ids, left-right swapped and shuffled prompts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from biclip_jax.core.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNKNOWN, CLS = "[PAD]", "[UNK]", "[CLS]"

_SIDES = {"left": "right", "right": "left"}
_LOCATION = r"(?:the )?(?:(?:all|upper|middle|lower|top|bottom|center|centre),? )*"
_RIGHT_FIRST = re.compile(
    rf"({_LOCATION})(right)( lung)? and ({_LOCATION})(left)( lung)?", re.IGNORECASE
)


def build_tokenizer(prompts: Sequence[str]) -> Tokenizer:
    """Builds a lower-case, word-level tokenizer from the words of the training prompts.

    Ids: 0 padding, 1 unknown, 2 [CLS] (prepended to each prompt), then the words in alphabetical
    order, so that the same prompts give the same ids.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words = {
        word
        for prompt in set(prompts)
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(prompt))
    }
    vocabulary = {word: i for i, word in enumerate([PAD, UNKNOWN, CLS, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A", special_tokens=[(CLS, vocabulary[CLS])]
    )
    return tokenizer


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids (N, max_length) int32, padded with 0, and their mask (N, max_length) bool.

    Each distinct prompt is tokenized once; longer prompts are truncated but keep their special
    tokens.

    Raises:
      UserError: max_length leaves no space for the special tokens.
    """
    max_tokens = _max_prompt_tokens(tokenizer, max_length)
    distinct = sorted(set(prompts))
    ids = np.zeros((len(distinct), max_length), np.int32)
    mask = np.zeros((len(distinct), max_length), bool)
    encodings = tokenizer.encode_batch(distinct, add_special_tokens=False)
    for row, encoding in enumerate(encodings):
        encoding.truncate(max_tokens)
        tokens = tokenizer.post_process(encoding).ids
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
    rows = np.searchsorted(np.array(distinct), np.array(prompts))
    return ids[rows], mask[rows]


def unknown_words(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[str]:
    """Returns the distinct words that are not in the vocabulary, in alphabetical order."""
    words = set()
    for prompt, encoding in zip(prompts, tokenizer.encode_batch(list(prompts)), strict=True):
        spans = zip(encoding.tokens, encoding.offsets, strict=True)
        words |= {prompt[start:end] for token, (start, end) in spans if token == UNKNOWN}
    return sorted(words)


def swap_sides(prompt: str) -> str:
    """Returns the prompt for the horizontally flipped image.

    Swaps left and right, preserving capitalisation. Then restores the usual order of such reports:
    the left lung is named before the right lung.
    """

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        other = _SIDES[word.lower()]
        return other.upper() if word.isupper() else other.title() if word.istitle() else other

    swapped = re.sub(r"\b(?:left|right)\b", swap, prompt, flags=re.IGNORECASE)
    return _RIGHT_FIRST.sub(r"\4\5\3 and \1\2\6", swapped)


def shuffle(prompts: Sequence[str], seed: int) -> list[str] | None:
    """Returns a different prompt of another row for each row; None if all prompts are equal."""
    if len(set(prompts)) < 2:
        return None
    rng = np.random.default_rng(seed)
    return [_different_prompt(prompts, prompt, rng) for prompt in prompts]


def _different_prompt(prompts: Sequence[str], prompt: str, rng: np.random.Generator) -> str:
    while True:
        candidate = prompts[int(rng.integers(len(prompts)))]
        if candidate != prompt:
            return candidate


def warn_truncated(tokenizer: Tokenizer, prompts: Sequence[str], max_length: int) -> None:
    """Warns if `encode` will truncate prompts, with their number."""
    max_tokens, distinct = _max_prompt_tokens(tokenizer, max_length), sorted(set(prompts))
    encodings = tokenizer.encode_batch(distinct, add_special_tokens=False)
    too_long = sum(len(encoding.ids) > max_tokens for encoding in encodings)
    if too_long:
        warnings.warn(
            f"{too_long} of {len(distinct)} prompts are longer than {max_length} tokens and are "
            "truncated (max_length of the model, at most the positions of the text encoder)",
            stacklevel=2,
        )


def _max_prompt_tokens(tokenizer: Tokenizer, max_length: int) -> int:
    special = tokenizer.num_special_tokens_to_add(False)
    if max_length < special:
        raise UserError(
            f"the model's max_length: found {max_length}; expected at least {special}, the "
            "special tokens around each prompt; raise it"
        )
    return max_length - special


def encode_fields(
    tokenizer: Tokenizer, prompts: Sequence[str], max_length: int
) -> dict[str, np.ndarray]:
    """Runs `encode`; returns the fields text_ids, text_mask and has_text of a `Batch`."""
    ids, mask = encode(tokenizer, prompts, max_length)
    return {"text_ids": ids, "text_mask": mask, "has_text": _has_text(prompts)}


def feature_fields(
    features: Mapping[str, np.ndarray], prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Returns text_features and has_text of a `Batch`, from embeddings {prompt: (D,)}."""
    vectors = np.stack([features[prompt] for prompt in prompts])
    return {"text_features": vectors, "has_text": _has_text(prompts)}


def _has_text(prompts: Sequence[str]) -> np.ndarray:
    return np.array([bool(prompt.strip()) for prompt in prompts], bool)
