"""Safetensors and Flax files, folders, sharded checkpoints, and files that must be refused."""

import json
import resource
import struct
import tracemalloc

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save, save_file

from biclip_jax.core.errors import UserError
from biclip_jax.weights.formats import tensor
from biclip_jax.weights.readers import FOLDER_ORDER, open_checkpoint
from tests.weights import payloads
from tests.weights.files import assert_same, rejection, write

ARRAYS = {
    name: np.arange(6).reshape(2, 3).astype(dtype) for name, dtype in tensor.DTYPES.items()
} | {"empty": np.zeros((0, 5), np.float32), "scalar": np.array(3.0, np.float32)}


def safetensors_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("name", ["a.safetensors", "without suffix", "wrong.bin"])
def test_reads_safetensors(tmp_path, name):
    save_file(ARRAYS, tmp_path / name, {"format": "np"})
    checkpoint = open_checkpoint(tmp_path / name)
    assert (checkpoint.path, checkpoint.format) == (tmp_path / name, "safetensors")
    assert_same(checkpoint.tensors, ARRAYS)


def test_reads_a_hand_written_safetensors_file(tmp_path):
    header = {"a.b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    path = write(tmp_path / "a.safetensors", safetensors_file(header, b"\x80\x3f\x20\xc0"))
    array = open_checkpoint(path).tensors["a.b"].read()
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array.astype(np.float32), [1, -2.5])


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, bytes(8)),
        ({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]}}, bytes(8)),
        ({"a": {"dtype": "F8_E5M2", "shape": [2], "data_offsets": [0, 2]}}, bytes(2)),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        ({"a": [1]}, b""),
        ({}, b""),
        (b"{" + b"[" * 10**6, b""),
        (b'{"a"', b""),
    ],
)
def test_rejects_a_wrong_safetensors_header(tmp_path, header, data):
    rejection(write(tmp_path / "a.safetensors", safetensors_file(header, data)))


def test_rejects_a_safetensors_header_longer_than_the_file(tmp_path):
    data = struct.pack("<Q", 2**60) + b'{"a": 1}'
    assert "header" in rejection(write(tmp_path / "a.safetensors", data))


def test_error_names_an_unknown_dtype(tmp_path):
    header = {"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}
    assert "F8_E4M3" in rejection(write(tmp_path / "a.bin", safetensors_file(header, b"\0")))


@pytest.mark.parametrize("name", ["flax_model.msgpack", "without suffix", "wrong.bin"])
def test_reads_flax_by_joined_names(tmp_path, name):
    tree = {"params": {"deep": {"er": dict(ARRAYS)}, "list": [np.ones(2, np.float32)]}}
    tree |= {"step": 3, "rate": 0.5, "name": "x" * 300, "none": None, "yes": True, "neg": -70000}
    tree["number"] = np.float32(2)
    tree |= {f"more{i}": np.int32(i) for i in range(40)}
    expected = {f"params/deep/er/{name}": array for name, array in ARRAYS.items()}
    expected |= {"params/list/0": np.ones(2, np.float32), "number": np.float32(2)}
    expected |= {f"more{i}": np.int32(i) for i in range(40)}
    write(tmp_path / name, serialization.msgpack_serialize(tree))
    checkpoint = open_checkpoint(tmp_path / name)
    assert checkpoint.format == "flax"
    assert_same(checkpoint.tensors, expected)


def test_reads_flax_arrays_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    tree = {"a": {"large": np.arange(60, dtype=np.float32).reshape(3, 4, 5), "small": np.ones(3)}}
    data = serialization.msgpack_serialize(tree)
    assert b"__msgpack_chunked_array__" in data
    path = write(tmp_path / "a.msgpack", data)
    expected = {"a/large": tree["a"]["large"], "a/small": tree["a"]["small"]}
    assert_same(open_checkpoint(path).tensors, expected)
    path.write_bytes(data.replace(b"\xa10\x03", b"\xa10\x04", 1))
    assert "chunks" in rejection(path)


def packed(shape, dtype, data, code=1, more=b""):
    return {"a": msgpack.ExtType(code, msgpack.packb((shape, dtype, data)) + more)}


def nested(depth):
    return {"a": nested(depth - 1)} if depth else packed([2], "float32", bytes(8))


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (packed([2], "float32", bytes(8), code=2), "code 2"),
        (packed([2], "float32", bytes(8), code=9), "code 9"),
        (packed([2], "object", bytes(16)), "object"),
        (packed([2], "datetime64[s]", bytes(16)), "datetime64"),
        (packed([2], "complex64", bytes(16)), "complex64"),
        (packed([3], "float32", bytes(8)), "does not fit its shape"),
        (packed([2], "float32", bytes(8), more=b"\0"), "does not fit its shape"),
        (packed([-2], "float32", bytes(8)), "not the shape"),
        (packed([2.0], "float32", bytes(8)), "not the shape"),
        (packed([2**62, 4], "float32", b""), "not the shape"),
        (packed([1] * 40, "float32", bytes(4)), "not a packed array"),
        ({"a": 1}, "without any array"),
        ({1: {}}, "a short text"),
        (nested(tensor.MAX_DEPTH + 1), "nested or repeated"),
        (200, "root is not a map"),
        ([1], "without any array"),
    ],
)
def test_rejects_wrong_msgpack_headers(tmp_path, tree, reason):
    assert reason in rejection(write(tmp_path / "a.msgpack", msgpack.packb(tree)))


@pytest.mark.parametrize(
    "data",
    [
        b"\x81\xa1a" * 100_000 + b"\xc0",
        b"\x81\xa1a\xdd\xff\xff\xff\xff" + b"\x01" * 100,
        b"\x81\xa1a\xdd\xff\xff\xff\xff" + b"\x01" * 1_100_000,
        b"\x81\xa1a\xdf\xff\xff\xff\xff",
        b"\x81\xa1a\xc9\xff\xff\xff\xff\x01" + b"\x01" * 100,
        b"\x81\xa1a\xdb\xff\xff\xff\xffabc",
        b"\x81\xdb\xff\xff\xff\xffabc",
        b"\x82\xa1a\xc0\xa1a\xc0",
        b"\x81\xa1a\xc0\x00",
        b"\x81\xa1a\xc1",
        b"\x81\xa1\xff\xc0",
    ],
    ids=lambda data: ascii(data[:12]),
)
def test_rejects_msgpack_bombs(tmp_path, data):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "cannot be read" in rejection(write(tmp_path / "a.msgpack", data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize("kind", ["safetensors", "msgpack"])
def test_damaged_files_give_a_user_error_or_arrays(tmp_path, kind):
    write_out = {"safetensors": save, "msgpack": serialization.msgpack_serialize}[kind]
    data = write_out({name: array for name, array in ARRAYS.items() if name != "empty"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusals = 0
    for changed in payloads.corrupted(data, seed=1, num_flips=300):
        path = write(tmp_path / f"a.{kind}", changed)
        try:
            for lazy in open_checkpoint(path).tensors.values():
                assert lazy.read().shape == lazy.shape
        except UserError as error:
            refusals += 1
            assert str(error).startswith(str(path))
    assert refusals > 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_only_the_array_being_read_is_in_memory(tmp_path):
    tree = {f"a{i}": np.full(2**18, i, np.float32) for i in range(8)}
    files = [
        write(tmp_path / "a.safetensors", save(tree)),
        write(tmp_path / "a.msgpack", serialization.msgpack_serialize(dict(tree))),
    ]
    for path in files:
        open_checkpoint(path)
        tracemalloc.start()
        for name, lazy in open_checkpoint(path).tensors.items():
            assert lazy.read()[0] == int(name[1:])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20 + 2**18, path


def test_error_identifies_files_without_weights(tmp_path):
    assert "no such file" in rejection(tmp_path / "missing.bin")
    assert "empty file" in rejection(write(tmp_path / "empty.bin", b""))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    assert "git lfs pull" in rejection(write(tmp_path / "model.safetensors", pointer))
    page = b"<!DOCTYPE html>\n<html>Not Found</html>"
    message = rejection(write(tmp_path / "page.bin", page))
    assert "text file" in message
    assert "<!DOCTYPE" in message
    assert "another kind" in rejection(write(tmp_path / "a.bin", b"\x01\x02" * 30))
    assert "safetensors file" in rejection(write(tmp_path / "b.safetensors", b"\x01\x02" * 30))
    rejection(tmp_path / ("x" * 400))


def folder_of(folder, *names):
    """Writes a folder of weight files; the array "a" of each is its index in `names`."""
    folder.mkdir()
    for index, name in enumerate(names):
        tree = {"a": np.full(1, index, np.int32)}
        write_out = serialization.msgpack_serialize if name.endswith(".msgpack") else save
        write(folder / name, write_out(tree))
    return folder


PLAIN = [name for name in FOLDER_ORDER if not name.endswith(".json")]


@pytest.mark.parametrize("first", range(len(PLAIN)))
def test_reads_the_first_known_name_in_a_folder(tmp_path, first):
    folder = folder_of(tmp_path / "m", *PLAIN[first:], "training.pt", "other.ckpt")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.path == folder / PLAIN[first]
    assert checkpoint.tensors["a"].read() == [0]


def test_reads_a_folder_with_one_other_file(tmp_path):
    folder = folder_of(tmp_path / "m", "clip.pt")
    (folder / "config.json").write_text("{}")
    assert open_checkpoint(folder).path == folder / "clip.pt"


def test_error_for_an_ambiguous_folder_lists_its_files(tmp_path):
    message = rejection(folder_of(tmp_path / "two", "one.pt", "two.bin"))
    for part in ("one.pt, two.bin", *FOLDER_ORDER, ".ckpt", "name the file"):
        assert part in message
    folder = folder_of(tmp_path / "none")
    assert "it is empty" in rejection(folder)
    (folder / "config.json").write_text("{}")
    assert "config.json" in rejection(folder)


SIZES = {"a": 1, "b": 2, "c": 3, "d": 4}


def sharded(folder, weight_map, name="model.safetensors.index.json", suffix="safetensors"):
    folder.mkdir(exist_ok=True)
    write_out = save if suffix == "safetensors" else serialization.msgpack_serialize
    write(folder / f"1.{suffix}", write_out({"a": np.ones(1, np.int32), "b": np.ones(2)}))
    write(folder / f"2.{suffix}", write_out({"c": np.ones(3), "d": np.ones(4)}))
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("model.safetensors.index.json", "safetensors"),
        ("flax_model.msgpack.index.json", "msgpack"),
        ("pytorch_model.bin.index.json", "safetensors"),
    ],
)
def test_reads_a_sharded_checkpoint(tmp_path, name, suffix):
    shards = {"c": f"2.{suffix}", "a": f"1.{suffix}", "d": f"2.{suffix}", "b": f"1.{suffix}"}
    folder = sharded(tmp_path / "m", shards, name, suffix)
    for path in (folder, folder / name):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == folder
        assert checkpoint.format == ("flax" if suffix == "msgpack" else "safetensors")
        assert {n: t.read().size for n, t in checkpoint.tensors.items()} == SIZES


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "1.safetensors", "x": "2.safetensors"}, "x, which 2.safetensors does not contain"),
        ({"a": "1.safetensors", "c": "3.safetensors"}, "3.safetensors, which is not"),
        ({"a": "../m/1.safetensors"}, "plain file name"),
        ({"a": "/etc/passwd"}, "plain file name"),
        ({"a": ".."}, "plain file name"),
        ({"a": "b\\1.safetensors"}, "plain file name"),
        ({"a": ""}, "plain file name"),
        ({"a": 3}, "plain file name"),
        ({}, "empty weight_map"),
        ([], "empty weight_map"),
        ('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "occurs twice"),
        ('{"metadata": {}}', "KeyError"),
        ("[" * 100_000, "RecursionError"),
        ("not json", "JSONDecodeError"),
    ],
)
def test_rejects_a_bad_index(tmp_path, weight_map, reason):
    folder = sharded(tmp_path / "m", weight_map)
    assert reason in rejection(folder / "model.safetensors.index.json")


def test_rejects_an_array_in_two_shards(tmp_path):
    folder = sharded(tmp_path / "m", {"a": "1.safetensors", "c": "2.safetensors"})
    save_file({"a": np.zeros(1), "c": np.zeros(1)}, folder / "2.safetensors")
    assert "a in more than one shard" in rejection(folder / "model.safetensors.index.json")


def test_rejects_shards_of_two_formats(tmp_path):
    folder = sharded(tmp_path / "m", {"a": "1.safetensors", "c": "2.bin"})
    tree = {"c": np.zeros(1)}
    write(folder / "2.bin", serialization.msgpack_serialize(tree))
    assert "2 formats" in rejection(folder / "model.safetensors.index.json")
