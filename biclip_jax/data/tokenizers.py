"""Reads and loads tokenizers; their files are not trusted."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biclip_jax.core.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"  # in a model folder
MAX_BYTES = 16 * 2**20
CLIP_MERGES = 49152 - 256 - 2

CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BOUNDARY_TOKENS = {"clip": CLIP_SPECIAL, "bert": ("[CLS]", "[SEP]")}

# Options of tokenizer_config.json -> name in BertWordPieceTokenizer, allowed values.
_BERT_OPTIONS: dict[str, tuple[str, tuple[bool | None, ...]]] = {
    "do_lower_case": ("lowercase", (True, False)),
    "strip_accents": ("strip_accents", (True, False, None)),
    "tokenize_chinese_chars": ("handle_chinese_chars", (True, False)),
}


def read_tokenizer(kind: str, path: str | os.PathLike[str]) -> Tokenizer:
    """Reads the tokenizer of a pretrained text encoder; downloads nothing and runs no code.

    The tokenizer puts <|startoftext|> and <|endoftext|> (clip) or [CLS] and [SEP] (bert) around
    each prompt. It neither pads nor truncates; `text.encode` does. In a folder, the first of these
    files is read; `path` may also be one of them, with any prefix to its name:

    - tokenizer.json, used as is;
    - clip: vocab.json and merges.txt; else bpe_simple_vocab_16e6.txt.gz, OpenAI's file;
    - bert: vocab.txt, with do_lower_case, strip_accents and tokenize_chinese_chars from a
      tokenizer_config.json next to it, of which nothing else is used: remote code that it names
      is not loaded.

    CLIP's text is normalised (NFC), lower-cased and its whitespace collapsed, as in transformers;
    OpenAI's repair of broken Unicode (ftfy) and HTML entities is left out. The literal text of a
    special token in a prompt, such as [SEP] or <|endoftext|>, becomes that token, as in
    transformers: it is not escaped.

    Args:
      kind: "clip" or "bert".
      path: Folder in Hugging Face's layout, or one of the files above.

    Raises:
      UserError: A file is missing, damaged, too large, or belongs to another kind of encoder.
      ValueError: Unknown kind.
    """
    if kind not in BOUNDARY_TOKENS:
        raise ValueError(f"kind: found {kind!r}, expected 'clip' or 'bert'")
    path = Path(path)
    tokenizer, boundary_tokens = _read_guarded(
        path, f"the tokenizer files of a {kind} text encoder", partial(_read, kind)
    )
    if boundary_tokens != BOUNDARY_TOKENS[kind]:
        raise _bad(
            path,
            f"a tokenizer that puts {' '.join(boundary_tokens) or 'nothing'} around a prompt",
            f"{' '.join(BOUNDARY_TOKENS[kind])}, as in {kind}",
            "give the files of that encoder, or the other kind",
        )
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads tokenizer.json; raises UserError if it is missing or damaged."""
    path = folder / TOKENIZER_FILE
    return _read_guarded(path, "a tokenizer.json of this package", _load)[0]


def _read_guarded(
    path: Path, expected: str, read: Callable[[Path], Tokenizer]
) -> tuple[Tokenizer, tuple[str, ...]]:
    """Returns the result of `read` and the tokens that it puts around a prompt."""
    try:
        tokenizer = read(path)
        return tokenizer, tuple(tokenizer.encode("").tokens)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exception or panics, which are not subclasses of it
        found = f"no usable tokenizer ({type(error).__name__}: {error})"
        raise _bad(path, found, expected, "download or write it again") from error


def _load(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_from_tokenizer_json(path))


def _read(kind: str, path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    file, read = _find_file(kind, path)
    # Through JSON, so that the tokenizer stored later is the one validated here.
    tokenizer = Tokenizer.from_str(read(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _find_file(kind: str, path: Path) -> tuple[Path, Callable[[Path], str]]:
    """Returns the file to read, and the function that converts it to tokenizer.json text."""
    for suffix, read in _READERS[kind].items():
        if path.is_dir():
            # Only OpenAI's file exists under other names, such as clip_bpe_simple_vocab...
            matches = sorted(path.glob(f"*{suffix}" if suffix.endswith(".gz") else suffix))
        else:
            matches = [path] if path.name.endswith(suffix) else []
        if matches:
            return matches[0], read
    if not path.exists():
        raise _bad(path, "no such file or folder", "a tokenizer", "check the name")
    raise _bad(
        path,
        "none of its files" if path.is_dir() else "a file of another name",
        f"one of {', '.join(_READERS[kind])}".replace("vocab.json", "vocab.json + merges.txt"),
        f"download the tokenizer files of the {kind} text encoder",
    )


def _from_tokenizer_json(path: Path) -> str:
    tokenizer = _json_object(path)
    model = tokenizer.get("model")
    # The library cuts off the prefix by bytes; cutting within a character aborts the process.
    if isinstance(model, dict) and model.get("merges") and model.get("continuing_subword_prefix"):
        raise _bad(
            path,
            "merges with a continuing_subword_prefix",
            "none, as in CLIP and BERT",
            "download the file again",
        )
    return json.dumps(tokenizer)


def _from_clip_pair(path: Path) -> str:
    merges = path.with_name(path.name.removesuffix("vocab.json") + "merges.txt")
    return _clip_json(path, _json_object(path), _merges(merges))


def _from_clip_archive(path: Path) -> str:
    from tokenizers import pre_tokenizers

    merges = _merges(path)[:CLIP_MERGES]
    # Ids are ordered by the code points of the characters that stand for the bytes.
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    word_ends = [f"{symbol}</w>" for symbol in symbols]
    words = [*symbols, *word_ends, *(left + right for left, right in merges), *CLIP_SPECIAL]
    return _clip_json(path, {word: i for i, word in enumerate(words)}, merges)


def _from_bert_vocabulary(path: Path) -> str:
    from tokenizers.implementations import BertWordPieceTokenizer

    vocabulary = {word: i for i, word in enumerate(_lines(path))}
    _require(path, vocabulary, BERT_SPECIAL)
    config = path.with_name(path.name.removesuffix("vocab.txt") + "tokenizer_config.json")
    options = _bert_options(config) if config.exists() else {}
    return BertWordPieceTokenizer(vocabulary, **options).to_str()


_READERS: dict[str, dict[str, Callable[[Path], str]]] = {
    "clip": {
        "tokenizer.json": _from_tokenizer_json,
        "vocab.json": _from_clip_pair,
        "bpe_simple_vocab_16e6.txt.gz": _from_clip_archive,
    },
    "bert": {"tokenizer.json": _from_tokenizer_json, "vocab.txt": _from_bert_vocabulary},
}


def _clip_json(path: Path, vocabulary: dict[str, int], merges: list[Any]) -> str:
    from transformers import CLIPTokenizer

    _require(path, vocabulary, CLIP_SPECIAL)
    return CLIPTokenizer(vocab=vocabulary, merges=merges).backend_tokenizer.to_str()


def _bert_options(path: Path) -> dict[str, Any]:
    config = _json_object(path)
    for name, (_, allowed) in _BERT_OPTIONS.items():
        value = config.get(name, True)
        if not any(value is choice for choice in allowed):
            raise _bad(
                path,
                f"{name} = {value!r}",
                f"one of {', '.join(json.dumps(choice) for choice in allowed)}",
                "fix that line",
            )
    return {option: config[name] for name, (option, _) in _BERT_OPTIONS.items() if name in config}


def _merges(path: Path) -> list[tuple[str, str]]:
    """Reads the pairs of a merges file, one per line, after a version header."""
    lines = _lines(path)
    if lines and "#version" in lines[0]:
        lines = lines[1:]
    merges = []
    for line in lines:
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise _bad(path, f"the line {line[:40]!r}", "two symbols", "download the file again")
        merges.append((left, right))
    return merges


def _require(path: Path, vocabulary: dict[str, int], tokens: tuple[str, ...]) -> None:
    # A tokenizer appends missing tokens, with ids beyond the rows of the encoder's embedding.
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise _bad(
            path,
            f"a vocabulary of {len(vocabulary)} entries without {', '.join(missing)}",
            "a vocabulary with its special tokens",
            "download the file again",
        )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"no JSON ({error})", "a JSON object", "download it again") from error
    if not isinstance(value, dict):
        raise _bad(path, f"a JSON {type(value).__name__}", "a JSON object", "download it again")
    return value


def _lines(path: Path) -> list[str]:
    # Not splitlines: vocabularies contain characters that it treats as line breaks.
    return _text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")


def _text(path: Path) -> str:
    """Reads the file as text, decompressed if it is gzip."""
    if not path.is_file():
        raise _bad(path, "no such file", "a file of the tokenizer", "download it, too")
    open_fn = gzip.open if path.suffix == ".gz" else open
    try:
        with open_fn(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(path, f"{error}", "a complete, readable file", "download it again") from error
    if len(data) > MAX_BYTES:
        raise _bad(path, f"more than {MAX_BYTES} bytes", "fewer", "download it again")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(path, f"no text ({error})", "UTF-8", "download it again") from error


def _bad(path: Path, found: str, expected: str, fix: str) -> UserError:
    return UserError(f"{path}: found {found}; expected {expected}; {fix}.")
