"""What the tests of the conversion share: the door, tiny towers, a tokenizer to give."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from biclip_jax import convert

TOWERS = Path(__file__).parent / "fixtures/encoders"


def run(*argv):
    with pytest.raises(SystemExit) as stopped:
        convert.main(list(map(str, argv)))
    return stopped.value.code


def answers(name):
    with np.load(TOWERS / name / "expected.npz") as file:
        return {key: jnp.asarray(value) for key, value in file.items()}


def close(found, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=atol)


def save_clip_tokenizer(path, num_words, marks=("<|startoftext|>", "<|endoftext|>")):
    """Words w0, w1, ... between the two tokens that CLIP, or another, puts around a sentence."""
    start, end = marks
    words = [f"w{i}" for i in range(num_words - 2)] + [start, end]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(start, num_words - 2), (end, num_words - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=special
    )
    tokenizer.save(str(path))
    return path
