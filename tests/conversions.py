"""Helpers of the tests of `convert`: the command, tiny encoders, a tokenizer."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from biclip_jax import convert

ENCODERS = Path(__file__).parent / "fixtures/encoders"


def run(*argv):
    with pytest.raises(SystemExit) as exit_info:
        convert.main(list(map(str, argv)))
    return exit_info.value.code


def expected_outputs(name):
    with np.load(ENCODERS / name / "expected.npz") as file:
        return {key: jnp.asarray(value) for key, value in file.items()}


def assert_close(actual, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=atol)


def save_clip_tokenizer(path, num_words, boundary_tokens=("<|startoftext|>", "<|endoftext|>")):
    """Saves a tokenizer with the words w0, w1, ... and the two boundary tokens."""
    start, end = boundary_tokens
    words = [f"w{i}" for i in range(num_words - 2)] + [start, end]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(start, num_words - 2), (end, num_words - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=special
    )
    tokenizer.save(str(path))
    return path
