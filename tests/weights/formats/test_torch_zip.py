"""Torch files: values against arithmetic and torch, malicious pickles, damaged files."""

import contextlib
import io
import pickle
import resource
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.weights.formats import pickle_machine, torch_zip
from biclip_jax.weights.readers import open_checkpoint
from tests.weights import payloads
from tests.weights.files import assert_same, rejection, write
from tests.weights.payloads import CONTAINERS, SUFFIXES, call, global_opcode, in_zip, pickled, text

FIXTURES = Path(__file__).parent.parent.parent / "fixtures/torch_files"
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
NAMES = list(payloads.payloads(Path("marker"), Path("script.py")))
LIVE = [
    name
    for name, payload in payloads.payloads(Path("marker"), Path("script.py")).items()
    if payload.is_live
]


def expected_state():
    """Returns the state of make_torch_files.state_dict, computed with numpy."""
    six, base = np.arange(6).reshape(2, 3), np.arange(12, dtype=np.float32)
    state = {
        name: six.astype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in DTYPES
    }
    return state | {
        "bool": six > 0,
        "base": base,
        "sliced": np.float32([2, 4, 6]),
        "transposed": base.reshape(3, 4).T,
        "expanded": np.ones((3, 4), np.float32),
        "parameter": np.arange(4, dtype=np.float32),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 5), np.float32),
    }


@pytest.fixture
def marker(tmp_path):
    script = tmp_path / "payload_script.py"
    script.write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    return tmp_path / "marker"


def payload_of(name, marker):
    return payloads.payloads(marker, marker.parent / "payload_script.py")[name]


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin", "lightning.ckpt"])
def test_fixtures_have_the_values_of_arithmetic(name):
    checkpoint = open_checkpoint(FIXTURES / name)
    assert (checkpoint.path, checkpoint.format) == (FIXTURES / name, "torch")
    assert_same(checkpoint.tensors, expected_state())


def test_torchscript_module_with_a_child_named_model_is_flattened():
    inner = {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "halves": np.arange(4, dtype=np.float16),
    }
    expected = {
        f"{prefix}.{name}": a for prefix in ("model", "layers.1") for name, a in inner.items()
    }
    tensors = open_checkpoint(FIXTURES / "script.pt").tensors
    assert sorted(tensors) == sorted(expected)
    assert_same({name: tensors[name] for name in expected}, expected)


def test_compressed_archive_gives_the_same_arrays(tmp_path):
    path = tmp_path / "compressed.pt"
    with (
        zipfile.ZipFile(FIXTURES / "zip.bin") as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in source.namelist():
            compressed.writestr(name, source.read(name))
    assert_same(open_checkpoint(path).tensors, expected_state())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_rejects_a_payload_by_name_without_executing_it(tmp_path, marker, name, container):
    payload = payload_of(name, marker)
    data = CONTAINERS[container](payload.body, marker)
    suffix = SUFFIXES[(NAMES.index(name) + list(CONTAINERS).index(container)) % len(SUFFIXES)]
    message = rejection(write(tmp_path / f"weights{suffix}", data))
    assert payload.words in message
    assert "nothing was executed" in message
    assert not marker.exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rejects_a_payload_with_any_suffix(tmp_path, marker, suffix):
    for container in CONTAINERS.values():
        data = container(payload_of("os.system", marker).body, marker)
        message = rejection(write(tmp_path / f"weights{suffix}", data))
        assert "os.system, which is not a tensor or a plain container" in message
    assert not marker.exists()


@pytest.mark.parametrize("name", LIVE)
def test_payload_is_executed_by_pickle(marker, name):
    data = pickled(payload_of(name, marker).body)
    code = "import pickle, sys; loaded = pickle.loads(sys.stdin.buffer.read())\n"
    code += "loaded.wait() if hasattr(loaded, 'wait') else None"
    subprocess.run(
        [sys.executable, "-c", code], input=data, capture_output=True, cwd=marker.parent, timeout=60
    )
    assert marker.exists()


def test_code_in_a_torchscript_archive_is_ignored(tmp_path, marker):
    body = payload_of("os.system", marker).body
    with zipfile.ZipFile(FIXTURES / "script.pt") as source:
        path = tmp_path / "script.pt"
        with zipfile.ZipFile(path, "w") as changed:
            for name in source.namelist():
                other = name.endswith((".py", "constants.pkl", "debug_pkl"))
                changed.writestr(name, pickled(body) if other else source.read(name))
    assert "model.weight" in open_checkpoint(path).tensors
    assert not marker.exists()


def test_rejected_files_change_no_global_state(tmp_path, marker):
    for name in NAMES:
        path = write(tmp_path / "weights.pt", in_zip(payload_of(name, marker).body, marker))
        rejection(path)
    assert not hasattr(OrderedDict, "__code__")
    assert_same(open_checkpoint(FIXTURES / "zip.bin").tensors, expected_state())


def doubling(times):
    """Returns dicts that each contain the previous one twice: 2**times leaves."""
    body = b"}q\x00"
    for i in range(times):
        reference = b"h" + bytes([i])
        body += b"}q" + bytes([i + 1]) + b"(" + text("a") + reference + text("b") + reference + b"u"
    return body


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"}" + b")" + b"\x85" * 200_000 + b"K\x01s", "tuple as a key"),
        (b"}r\xff\xff\xff\xff", "no tensor"),
        (b"\x8e" + b"\xff" * 7 + b"\x00", "bytes8"),
        (b"\x8b\xff\xff\xff\x7f", "long4"),
        (b"}q\x00" + text("a") + b"h\x00s", "nested or repeated"),
        (doubling(60), "nested or repeated"),
    ],
    ids=["tuple key", "memo index", "long bytes", "long int", "cycle", "doubling dicts"],
)
def test_rejects_pickle_bombs(tmp_path, marker, body, reason):
    assert reason in rejection(write(tmp_path / "weights.bin", in_zip(body, marker)))


@contextlib.contextmanager
def at_most(num_bytes):
    """Asserts that the block allocates less than `num_bytes` at its peak."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < num_bytes


@pytest.mark.parametrize("by", ["OrderedDict", "BUILD"])
def test_rejects_a_container_that_is_copied_thousands_of_times(tmp_path, marker, by, monkeypatch):
    """All copies would be 200 MB; the lowered limit shows that it is the limit that stops them."""
    path = tmp_path / "weights.pt"
    monkeypatch.setattr(pickle_machine, "MAX_COPIES", 2**17)
    path.write_bytes(in_zip(payloads.repeated_copies(5000, 2**10, by), marker))
    with at_most(16 * 2**20):
        assert "copies more than any model's" in rejection(path)
    path.write_bytes(in_zip(payloads.repeated_copies(100, 2**10, by), marker))
    assert "copies" not in rejection(path)


def test_copy_limit_bounds_memory_and_time_of_a_small_file(tmp_path, marker):
    body = payloads.repeated_copies(5000, 2**14, "BUILD")
    path = write(tmp_path / "weights.pt", in_zip(body, marker))
    assert path.stat().st_size < 2**18
    started = time.monotonic()
    with at_most(256 * 2**20):
        assert "copies more than any model's" in rejection(path)
    assert time.monotonic() - started < 10


def interpret_body(body):
    return pickle_machine.interpret(io.BytesIO(pickled(body)), {})


def test_a_text_that_is_encoded_thousands_of_times_uses_little_memory(tmp_path, marker):
    length, times = 2**20, 5000
    raw = text("raw") + payloads.repeated_encoding(times, length)
    body = one_tensor(4, 0, [4], [1]) + raw + b"s"
    path = write(tmp_path / "weights.pt", in_zip(body, marker, FOUR))
    with at_most(16 * length):
        assert list(open_checkpoint(path).tensors) == ["a"]
    assert interpret_body(payloads.repeated_encoding(3, 5)) == [b""] * 3


def tensor(length, offset, shape, strides, key="0", kind="FloatStorage"):
    """Returns a pickled float tensor over a storage of `length` elements."""

    def number(value):
        return b"J" + int(value).to_bytes(4, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + global_opcode(f"torch.{kind}") + text(key) + text("cpu")
    arguments = [storage + number(length) + b"tQ", number(offset), numbers(shape), numbers(strides)]
    hooks = call(global_opcode("collections.OrderedDict"))
    return call(global_opcode("torch._utils._rebuild_tensor_v2"), *arguments, b"\x89", hooks)


def one_tensor(*description, **more):
    return b"}" + text("a") + tensor(*description, **more) + b"s"


FOUR = [("data/0", np.arange(4, dtype=np.float32).tobytes())]


def test_reads_a_hand_written_tensor(tmp_path, marker):
    path = write(tmp_path / "a.pt", in_zip(one_tensor(4, 1, [2], [2]), marker, FOUR))
    np.testing.assert_array_equal(open_checkpoint(path).tensors["a"].read(), [1, 3])


@pytest.mark.parametrize(
    "description",
    [
        (4, 1, [4], [1]),
        (4, 0, [2, 2], [3, 1]),
        (4, 0, [2], [-1]),
        (4, -1, [2], [1]),
        (4, 0, [-2], [1]),
        (4, 0, [2], [1, 1]),
        (8, 0, [8], [1]),
        (2**30, 0, [2**30], [1]),
        (4, 0, [2**30], [0]),
        (-4, 0, [2], [1]),
        (4, 0, [1] * 40, [1] * 40),
    ],
)
def test_rejects_a_tensor_outside_its_storage(tmp_path, marker, description):
    rejection(write(tmp_path / "a.pt", in_zip(one_tensor(*description), marker, FOUR)))


def test_only_the_array_being_read_is_in_memory(tmp_path, marker):
    length, keys = 2**18, [str(i) for i in range(8)]
    extra = [(f"data/{key}", np.full(length, int(key), np.float32).tobytes()) for key in keys]
    body = b"}" + b"".join(
        text(key) + tensor(length, 0, [length], [1], key=key) + b"s" for key in keys
    )
    path = write(tmp_path / "a.pt", in_zip(body, marker, extra))
    tracemalloc.start()
    for name, lazy in open_checkpoint(path).tensors.items():
        assert lazy.read()[-1] == int(name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * length + 2**19


def test_rejects_big_endian(tmp_path, marker):
    extra = [*FOUR, ("byteorder", b"big")]
    data = in_zip(one_tensor(4, 0, [4], [1]), marker, extra)
    assert "byte order" in rejection(write(tmp_path / "a.pt", data))
    extra[-1] = ("byteorder", b"little")
    data = in_zip(one_tensor(4, 0, [4], [1]), marker, extra)
    assert "a" in open_checkpoint(write(tmp_path / "a.pt", data)).tensors


def test_rejects_a_zip_bomb_before_decompressing(tmp_path, marker):
    length = 16 * 2**20
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickled(one_tensor(length, 0, [length], [1])))
        archive.writestr("a/data/0", bytes(4 * length))
    assert path.stat().st_size < 2**17
    assert "not weights" in rejection(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickled(b"N" * (torch_zip.MAX_PICKLE + 1)))
    assert "more than any model" in rejection(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_rejects_other_compression(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", method) as archive:
        archive.writestr("a/data.pkl", pickled(b"N"))
    assert "compressed in a way" in rejection(tmp_path / "a.pt")


def test_error_identifies_other_archives_and_pickles(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    assert "a.npy" in rejection(tmp_path / "arrays.npz")
    plain_pickle = write(tmp_path / "plain.bin", pickle.dumps({"a": 1}))
    assert "torch did not write" in rejection(plain_pickle)
    tar = bytes(257) + b"ustar" + bytes(250)
    assert "load and save it again" in rejection(write(tmp_path / "old.pt", tar))


def test_rejects_a_file_without_tensors(tmp_path, marker):
    body = b"}" + text("epoch") + b"K\x03s"
    assert "no tensor" in rejection(write(tmp_path / "a.pt", in_zip(body, marker)))
    assert "not a dict" in rejection(write(tmp_path / "a.pt", in_zip(b"]", marker)))


def test_rejects_a_file_that_changes_after_opening(tmp_path):
    path = write(tmp_path / "a.bin", (FIXTURES / "legacy.bin").read_bytes())
    tensors = open_checkpoint(path).tensors
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="shorter"):
        tensors["base"].read()
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        tensors["base"].read()


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin", "script.pt"])
def test_damaged_files_give_a_user_error_or_arrays(tmp_path, name):
    data = (FIXTURES / name).read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusals = 0
    for changed in payloads.corrupted(data, seed=0, num_flips=300):
        path = write(tmp_path / name, changed)
        try:
            for tensor in open_checkpoint(path).tensors.values():
                assert tensor.read().shape == tensor.shape
        except UserError as error:
            refusals += 1
            assert str(error).startswith(str(path))
    assert refusals > 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


SAVE_OPTIONS = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "zip, protocol 4": {"pickle_protocol": 4},
    "legacy, protocol 5": {"_use_new_zipfile_serialization": False, "pickle_protocol": 5},
}


def bits(tensor):
    torch = pytest.importorskip("torch")
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(tensors, state):
    torch = pytest.importorskip("torch")
    state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    assert list(tensors) == list(state)
    for name, value in state.items():
        assert tensors[name].read().tobytes() == bits(value), name
        assert tensors[name].shape == tuple(value.shape), name


@pytest.mark.parametrize("options", SAVE_OPTIONS)
def test_reads_files_of_torch_save_bit_for_bit(tmp_path, options):
    torch = pytest.importorskip("torch")
    from tests.fixtures import make_torch_files

    state = make_torch_files.state_dict()
    state["random"] = torch.randn(3, 4, 5).permute(2, 0, 1)[1:, :, ::2]
    torch.save(state, tmp_path / "a.bin", **SAVE_OPTIONS[options])
    assert_same_bits(open_checkpoint(tmp_path / "a.bin").tensors, state)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_reads_a_training_checkpoint_with_optimizer_and_numpy_scalars(tmp_path, key):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    saved = {
        "epoch": 3,
        key: model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "loss": np.float32(2),
        "hyper_parameters": {"lr": np.float64(0.1), "tags": {"a"}, "raw": b"\xff\x00"},
    }
    torch.save(saved, tmp_path / "a.ckpt")
    assert_same_bits(open_checkpoint(tmp_path / "a.ckpt").tensors, model.state_dict())


@pytest.mark.parametrize("make", ["script", "trace"])
def test_torch_jit(tmp_path, make):
    torch = pytest.importorskip("torch")
    from tests.fixtures import make_torch_files

    outer = make_torch_files.Outer()
    scripted = (
        torch.jit.trace(outer, torch.ones(1, 2)) if make == "trace" else torch.jit.script(outer)
    )
    torch.jit.save(scripted, str(tmp_path / "a.pt"))
    tensors = open_checkpoint(tmp_path / "a.pt").tensors
    state = scripted.state_dict()
    assert sorted(tensors) == sorted(state)
    assert_same_bits({name: tensors[name] for name in state}, state)


def test_rejects_a_pickled_module_by_its_class(tmp_path):
    torch = pytest.importorskip("torch")
    for options in SAVE_OPTIONS.values():
        torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt", **options)
        assert "torch.nn.modules.linear.Linear" in rejection(tmp_path / "a.pt")


def test_rejects_a_storage_with_two_dtypes(tmp_path, marker):
    other = tensor(4, 0, [4], [1], kind="IntStorage")
    body = b"}" + text("a") + tensor(4, 0, [4], [1]) + b"s" + text("b") + other + b"s"
    assert "two sizes or dtypes" in rejection(write(tmp_path / "a.pt", in_zip(body, marker, FOUR)))


def test_rejects_a_repeated_zip_member(tmp_path, marker):
    data = io.BytesIO(in_zip(one_tensor(4, 0, [4], [1]), marker, FOUR))
    with zipfile.ZipFile(data, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("archive/data/0", bytes(16))
    assert "occurs twice" in rejection(write(tmp_path / "a.pt", data.getvalue()))


def test_calls_with_a_large_tuple_of_arguments_are_counted():
    size = 2**18
    call = b"h\x01h\x00R0"
    counter = b"0ccollections\nCounter\nq\x010"
    data = b"\x80\x02(" + b"N" * size + b"tq\x00" + counter + call * 5 + b"N."
    with pytest.raises(ValueError, match="copies more"):
        pickle_machine.interpret(io.BytesIO(data), {})
