"""Tokenizers of pretrained text encoders: against independent encoders, and with hostile files."""

import gzip
import itertools
import json
import unicodedata

import pytest
import regex

from biclip_jax.core.errors import UserError
from biclip_jax.data import text, tokenizers
from biclip_jax.data.tokenizers import MAX_BYTES, read_tokenizer

ARCHIVE = "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ["l u", "n g</w>", "lu ng</w>", "l e", "f t</w>", "le ft</w>", "Ã ©</w>", "# #</w>", ". ."]
WORDS = ["[PAD]", "[unused0]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "lung", "left", "Left", "##s"]
WORDS += ["resume", "résumé", "肺", "肺炎", ",", ".", "a", "##b"]
PROMPTS = [
    "lower LEFT lung, upper right lung.",
    "  a\tleft \n lung's  résumé  ",
    "lungs lungft ## # ... <|> [x] 12 3½ I'LL",
    "Résumé re\u0301sume\u0301 肺炎 \u2028 😀",
    "ab aab abc Left",
    "",
    " ",
]


def byte_symbols():
    """Returns {byte: printable character}; unprintable bytes are mapped to 256 and above."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {byte: chr(byte) for byte in printable} | shifted


def plain_bpe(merges):
    """Returns CLIP's tokenizer in plain Python: (function from a prompt to ids, vocabulary)."""
    symbols = byte_symbols()
    pairs = [tuple(line.split()) for line in merges]
    words = [*symbols.values(), *(symbol + "</w>" for symbol in symbols.values())]
    words += ["".join(pair) for pair in pairs] + [START, END]
    vocabulary = {word: i for i, word in enumerate(words)}
    rank = {pair: i for i, pair in enumerate(pairs)}
    pieces = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    )

    def parts_of(piece):
        if piece in (START, END):
            return [piece]
        parts = [symbols[byte] for byte in piece.encode()]
        parts[-1] += "</w>"
        while known := [pair for pair in itertools.pairwise(parts) if pair in rank]:
            best, joined = min(known, key=rank.get), []
            for part in parts:
                if joined and not joined[-1][1] and (joined[-1][0], part) == best:
                    joined[-1] = ("".join(best), True)
                else:
                    joined.append((part, False))
            parts = [part for part, _ in joined]
        return parts

    def encode(prompt):
        cleaned = " ".join(unicodedata.normalize("NFC", prompt).split()).lower()
        parts = [part for piece in pieces.findall(cleaned) for part in parts_of(piece)]
        return [vocabulary[part] for part in [START, *parts, END]]

    return encode, vocabulary


def write_archive(folder, merges=MERGES):
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges]
    path = folder / f"clip_{ARCHIVE}"
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return path


def write_pair(folder, merges=MERGES):
    (folder / "vocab.json").write_text(json.dumps(plain_bpe(merges)[1]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder / "vocab.json"


def write_words(folder, config=None, newline="\n"):
    (folder / "vocab.txt").write_bytes((newline.join(WORDS) + newline).encode())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "vocab.txt"


def write_json(folder, **changes):
    """Writes a tokenizer.json of BERT with some fields changed."""
    write_words(folder)
    stored = json.loads(read_tokenizer("bert", folder).to_str())
    (folder / "tokenizer.json").write_text(json.dumps(stored | changes))
    return stored


def ids_of(tokenizer, prompts=PROMPTS):
    return [encoding.ids for encoding in tokenizer.encode_batch(prompts)]


@pytest.mark.parametrize("write", [write_archive, write_pair])
@pytest.mark.parametrize("from_folder", [True, False])
def test_clip_gives_the_ids_of_a_plain_python_encoder(tmp_path, write, from_folder):
    file = write(tmp_path)
    tokenizer = read_tokenizer("clip", tmp_path if from_folder else file)
    encode, vocabulary = plain_bpe(MERGES)
    assert tokenizer.get_vocab() == vocabulary
    assert ids_of(tokenizer) == [encode(prompt) for prompt in PROMPTS]


def test_clip_gives_the_ids_of_transformers(tmp_path):
    from transformers import CLIPTokenizer

    write_pair(tmp_path)
    reference = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    expected = [reference(prompt)["input_ids"] for prompt in PROMPTS]
    assert ids_of(read_tokenizer("clip", tmp_path)) == expected


def test_merges_beyond_the_size_of_clips_vocabulary_are_left_out(tmp_path):
    symbols = list(byte_symbols().values())
    merges = [f"{left} {right}" for left in symbols for right in symbols]
    tokenizer = read_tokenizer("clip", write_archive(tmp_path, merges))
    assert tokenizer.get_vocab_size() == 49408
    assert [tokenizer.token_to_id(token) for token in (START, END)] == [49406, 49407]


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"strip_accents": None, "tokenize_chinese_chars": False},
    ],
)
def test_bert_gives_the_ids_of_transformers(tmp_path, config):
    from transformers import BertTokenizer

    reference = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, **(config or {}))
    expected = [reference(prompt)["input_ids"] for prompt in PROMPTS]
    write_words(tmp_path, config)
    for path in (tmp_path, tmp_path / "vocab.txt"):
        assert ids_of(read_tokenizer("bert", path)) == expected


def test_options_of_bert_change_the_ids(tmp_path):
    def ids(config):
        write_words(tmp_path, config)
        return read_tokenizer("bert", tmp_path).encode("Left résumé 肺炎").ids[1:-1]

    id_of = {word: i for i, word in enumerate(WORDS)}
    unknown = id_of["[UNK]"]
    assert ids({}) == [id_of["left"], id_of["resume"], id_of["肺"], unknown]
    assert ids({"do_lower_case": False}) == [id_of["Left"], id_of["résumé"], id_of["肺"], unknown]
    assert ids({"tokenize_chinese_chars": False}) == [id_of["left"], id_of["resume"], id_of["肺炎"]]


def test_files_may_have_a_prefix_and_windows_line_ends(tmp_path):
    write_words(tmp_path, {"do_lower_case": False}, newline="\r\n")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).rename(tmp_path / f"xray_{name}")
    tokenizer = read_tokenizer("bert", str(tmp_path / "xray_vocab.txt"))
    assert tokenizer.encode("Left lung").tokens == ["[CLS]", "Left", "lung", "[SEP]"]


@pytest.mark.parametrize(("kind", "write"), [("clip", write_archive), ("bert", write_words)])
def test_saved_and_loaded_tokenizer_gives_the_same_ids(tmp_path, kind, write):
    write(tmp_path)
    tokenizer = read_tokenizer(kind, tmp_path)
    (tmp_path / "stored").mkdir()
    tokenizer.save(str(tmp_path / "stored/tokenizer.json"))
    assert ids_of(tokenizers.load_tokenizer(tmp_path / "stored")) == ids_of(tokenizer)
    assert ids_of(read_tokenizer(kind, tmp_path / "stored")) == ids_of(tokenizer)


def test_tokenizer_json_comes_first_and_loses_padding_and_truncation(tmp_path):
    write_words(tmp_path)
    tokenizer = read_tokenizer("bert", tmp_path)
    expected = ids_of(tokenizer)
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("not read")
    loaded = read_tokenizer("bert", tmp_path)
    assert loaded.padding is None
    assert loaded.truncation is None
    assert ids_of(loaded) == expected


def test_special_tokens_in_a_prompt_become_those_tokens(tmp_path):
    write_words(tmp_path)
    write_archive(tmp_path)
    bert, clip = (read_tokenizer(kind, tmp_path) for kind in ("bert", "clip"))
    assert bert.encode("left [SEP] lung").tokens == ["[CLS]", "left", "[SEP]", "lung", "[SEP]"]
    assert bert.encode("[sep]").tokens == ["[CLS]", *["[UNK]"] * 3, "[SEP]"]
    tokens = [START, "left</w>", END, "lung</w>", END]
    assert clip.encode(f"left {END} lung").tokens == tokens
    encode, vocabulary = plain_bpe(MERGES)
    assert encode(f"left {END} lung") == [vocabulary[token] for token in tokens]


@pytest.mark.parametrize(
    ("kind", "write", "closing"), [("clip", write_archive, END), ("bert", write_words, "[SEP]")]
)
def test_encode_keeps_the_closing_token_of_a_truncated_prompt(tmp_path, kind, write, closing):
    write(tmp_path)
    tokenizer = read_tokenizer(kind, tmp_path)
    before = tokenizer.to_str()
    ids, mask = text.encode(tokenizer, ["lung", "left lung left lung", "", "lung"], 4)
    end = tokenizer.token_to_id(closing)
    left, lung = tokenizer.encode("left lung").ids[1:-1]
    start = tokenizer.encode("").ids[0]
    assert ids.tolist() == [
        [start, lung, end, 0],
        [start, left, lung, end],
        [start, end, 0, 0],
        [start, lung, end, 0],
    ]
    assert mask.sum(1).tolist() == [3, 4, 2, 3]
    assert tokenizer.to_str() == before


def test_remote_code_next_to_the_vocabulary_is_never_run(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    remote = {
        "model_type": "cxr-bert",
        "tokenizer_class": "RemoteTokenizer",
        "auto_map": {"AutoTokenizer": ["remote.RemoteTokenizer", None]},
    }
    write_words(tmp_path, remote)
    (tmp_path / "config.json").write_text(json.dumps(remote))
    code = f"open({str(marker)!r}, 'w').close()\nclass RemoteTokenizer: pass\n"
    for name in ("remote.py", "__init__.py", "tokenizers.py", "transformers.py"):
        (tmp_path / name).write_text(code)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    assert read_tokenizer("bert", tmp_path).encode("lung").tokens == ["[CLS]", "lung", "[SEP]"]
    assert not marker.exists()


def assert_fails(kind, path, *words, begins=None):
    """Asserts a UserError whose message begins with the file's name and contains the words."""
    with pytest.raises(UserError) as caught:
        read_tokenizer(kind, path)
    message = str(caught.value)
    assert message.startswith(f"{begins or path}: found "), message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_error_names_missing_files(tmp_path, kind):
    assert_fails(kind, tmp_path, "none of its files", "tokenizer.json")
    assert_fails(kind, tmp_path / "nowhere", "no such file or folder")
    assert_fails(kind, tmp_path / "tokenizer.json", "no such file")
    (tmp_path / "words.doc").write_text("")
    assert_fails(kind, tmp_path / "words.doc", "another name")
    (tmp_path / "tokenizer.json").mkdir()
    assert_fails(kind, tmp_path, "no such file", begins=tmp_path / "tokenizer.json")


def test_rejects_a_vocabulary_without_merges(tmp_path):
    write_pair(tmp_path)
    (tmp_path / "merges.txt").unlink()
    assert_fails("clip", tmp_path, "no such file", begins=tmp_path / "merges.txt")


@pytest.mark.parametrize(
    ("corruption", "words"),
    [
        (lambda data: data[: len(data) // 2], "end-of-stream"),
        (lambda data: b"plain text", "gzip"),
        (lambda data: b"", "the line ''"),
        (lambda data: data[:10] + b"\xff" * 40, "Error"),
        (lambda data: gzip.compress(b"\x00\xff\xfe"), "no text"),
        (lambda data: gzip.compress(b"#version\none two three\n"), "'one two three'"),
        (lambda data: gzip.compress(b"#version\n\n\n"), "''"),
        (lambda data: gzip.compress(b"#version\nqq qq\n"), "no usable tokenizer"),
        (lambda data: gzip.compress(bytes(MAX_BYTES + 1)), f"more than {MAX_BYTES} bytes"),
        (lambda data: gzip.compress(bytes(8 * MAX_BYTES)), f"more than {MAX_BYTES} bytes"),
    ],
)
def test_rejects_a_damaged_archive(tmp_path, corruption, words):
    path = write_archive(tmp_path)
    path.write_bytes(corruption(path.read_bytes()))
    assert_fails("clip", path, words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x89PNG\x00\xff", "no text"),
        (b"", "without [PAD], [UNK]"),
        (b"lung\nleft\n", "2 entries without"),
        ("\n".join(WORDS[:3]).encode(), "without [UNK], [SEP], [MASK]"),
        (b"\n" * (MAX_BYTES + 1), f"more than {MAX_BYTES}"),
    ],
)
def test_rejects_an_invalid_word_list(tmp_path, data, words):
    write_words(tmp_path).write_bytes(data)
    assert_fails("bert", tmp_path, words, begins=tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "no JSON"),
        ("[]", "a JSON list"),
        ('{"do_lower_case": "false"}', "do_lower_case = 'false'"),
        ('{"tokenize_chinese_chars": null}', "expected one of true, false"),
        ('{"strip_accents": 1}', "expected one of true, false, null"),
    ],
)
def test_rejects_invalid_options(tmp_path, config, words):
    write_words(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert_fails("bert", tmp_path, words, begins=tmp_path / "tokenizer_config.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("content", ["not JSON", "", "[" * 100_000, "[1]", '"text"', "9" * 5000])
def test_rejects_invalid_json(tmp_path, name, content):
    write_pair(tmp_path)
    (tmp_path / name).write_text(content)
    assert_fails("clip", tmp_path, "JSON", begins=tmp_path / name)


@pytest.mark.parametrize(
    "changes", [{START: -1}, {START: "x"}, {START: 2**40}, {"\ud800": 5}, {START: [1]}]
)
def test_rejects_invalid_ids(tmp_path, changes):
    path = write_pair(tmp_path)
    path.write_text(json.dumps(plain_bpe(MERGES)[1] | changes))
    assert_fails("clip", tmp_path, "no usable tokenizer")


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
TEMPLATE["single"] = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}]
PREFIXED = {"type": "BPE", "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": ["a é"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "no usable tokenizer"),
        ({"model": {"type": "Remote"}}, "no usable tokenizer"),
        ({"post_processor": None}, "puts nothing around"),
        ({"post_processor": TEMPLATE}, "PanicException"),
        ({"model": PREFIXED | {"continuing_subword_prefix": "#"}}, "continuing_subword_prefix"),
    ],
)
def test_rejects_a_hostile_tokenizer_json(tmp_path, changes, words):
    write_json(tmp_path, **changes)
    path = tmp_path / "tokenizer.json"
    assert_fails("bert", path, words)


def test_rejects_the_tokenizer_of_the_other_kind(tmp_path):
    write_json(tmp_path)
    assert_fails("clip", tmp_path, "[CLS] [SEP]", f"{START} {END}")
    with pytest.raises(ValueError, match="'t5'"):
        read_tokenizer("t5", tmp_path)
