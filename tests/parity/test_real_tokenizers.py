"""The tokenizers of CXR-BERT and CLIP with their vocabularies, on the captions of datasets.

Set BICLIP_TOKENIZERS to a folder with *vocab.txt and *bpe_simple_vocab_16e6.txt.gz, and
BICLIP_CAPTIONS to text files with one caption per line (separated as in PATH).
"""

import gzip
import os
from pathlib import Path

import pytest

from biclip_jax.data import text, tokenizers
from biclip_jax.data.tokenizers import read_tokenizer
from tests.data.test_tokenizers import plain_bpe

FOLDER, FILES = os.environ.get("BICLIP_TOKENIZERS"), os.environ.get("BICLIP_CAPTIONS")

pytestmark = pytest.mark.skipif(
    not (FOLDER and FILES), reason="BICLIP_TOKENIZERS and BICLIP_CAPTIONS are not set"
)


@pytest.fixture(scope="module")
def prompts():
    """Returns the distinct captions of all files, sorted."""
    files = [Path(name) for name in FILES.split(os.pathsep)]
    lines = [line for file in files for line in file.read_text("utf-8").split("\n")]
    return sorted({line for line in lines if line.strip()})


def vocabulary_file(ending):
    (path,) = Path(FOLDER).glob(f"*{ending}")
    return path


def clip_merges():
    with gzip.open(vocabulary_file("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        return file.read().split("\n")[1 : 49152 - 256 - 2 + 1]


def differing(tokenizer, prompts, reference):
    """Returns the captions whose ids differ; prints how many were compared."""
    encodings = tokenizer.encode_batch(prompts)
    pairs = zip(prompts, encodings, strict=True)
    different = [prompt for prompt, encoding in pairs if encoding.ids != reference(prompt)]
    print(f"{len(prompts)} distinct captions compared, {len(different)} differ")
    return different


def test_cxr_bert_matches_transformers(prompts):
    from transformers import BertTokenizer

    file = vocabulary_file("vocab.txt")
    tokenizer = read_tokenizer("bert", file)
    assert tokenizer.get_vocab_size() == 30522
    ids = [tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]")]
    assert ids == [2, 3, 0]
    words = file.read_text("utf-8").removesuffix("\n").split("\n")
    reference = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    assert differing(tokenizer, prompts, lambda s: reference(s)["input_ids"]) == []


def test_clip_matches_plain_python(prompts):
    tokenizer = read_tokenizer("clip", FOLDER)
    assert tokenizer.get_vocab_size() == 49408
    ids = [tokenizer.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>")]
    assert ids == [49406, 49407]
    encode, vocabulary = plain_bpe(clip_merges())
    assert tokenizer.get_vocab() == vocabulary
    assert differing(tokenizer, prompts, encode) == []


def test_clip_matches_transformers(prompts):
    from transformers import CLIPTokenizer

    merges = [tuple(line.split()) for line in clip_merges()]
    vocabulary = plain_bpe(clip_merges())[1]
    reference = CLIPTokenizer(vocab=vocabulary, merges=merges)
    tokenizer = read_tokenizer("clip", FOLDER)
    assert differing(tokenizer, prompts, lambda s: reference(s)["input_ids"]) == []


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_loaded_tokenizer_encodes_like_the_stored_one(prompts, kind, tmp_path):
    tokenizer = read_tokenizer(kind, vocabulary_file("vocab.txt") if kind == "bert" else FOLDER)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load_tokenizer(tmp_path)
    for expected, found in zip(
        text.encode(tokenizer, prompts, 77), text.encode(loaded, prompts, 77), strict=True
    ):
        assert (expected == found).all()
