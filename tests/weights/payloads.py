"""Pickles that create a marker file when executed, in the containers that torch uses."""

import io
import pickle
import struct
import zipfile
from typing import NamedTuple

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SYS_INFO = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {}}


class Payload(NamedTuple):
    """A pickle's body between PROTO and STOP, and the words expected in the error."""

    body: bytes
    words: str
    is_live: bool = True


def text(value):
    data = str(value).encode()
    return b"X" + struct.pack("<I", len(data)) + data


def global_opcode(name):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    """Returns a REDUCE of a function with arguments, all given as pickle code."""
    return function + b"(" + b"".join(arguments) + b"tR"


def payloads(marker, script):
    """Returns {name: Payload}; `script` is a Python file next to the marker that creates it."""
    touch_command, open_code = text(f"touch {marker}"), text(f"open({str(marker)!r}, 'w')")
    system = global_opcode("os.system")
    os_module = call(global_opcode("builtins.__import__"), text("os"))
    by_getattr = call(global_opcode("builtins.getattr"), os_module, text("system"))
    in_dict = b"](" + text("a") + call(system, touch_command) + b"ta"
    encode, rebuild = (
        global_opcode("_codecs.encode"),
        global_opcode("torch._utils._rebuild_tensor_v2"),
    )
    state = b"}" + text("__code__") + b"Ns"
    ordered = global_opcode("collections.OrderedDict")
    object_dtype = call(global_opcode("numpy.dtype"), text("O8"))
    return {
        "os.system": Payload(call(system, touch_command), "os.system"),
        "posix.system": Payload(call(global_opcode("posix.system"), touch_command), "posix.system"),
        "Popen": Payload(
            call(
                global_opcode("subprocess.Popen"), b"]" + text("touch") + b"a" + text(marker) + b"a"
            ),
            "subprocess.Popen",
        ),
        "eval": Payload(call(global_opcode("builtins.eval"), open_code), "builtins.eval"),
        "exec": Payload(call(global_opcode("builtins.exec"), open_code), "builtins.exec"),
        "python 2 eval": Payload(
            call(global_opcode("__builtin__.eval"), open_code), "__builtin__.eval"
        ),
        "getattr": Payload(call(by_getattr, touch_command), "builtins.getattr"),
        "import": Payload(
            call(global_opcode("builtins.__import__"), text(script.stem)), "builtins.__import__"
        ),
        "partial": Payload(
            call(call(global_opcode("functools.partial"), system, touch_command)),
            "functools.partial",
        ),
        "runpy": Payload(call(global_opcode("runpy.run_path"), text(script)), "runpy.run_path"),
        "STACK_GLOBAL": Payload(
            call(text("os") + text("system") + b"\x93", touch_command), "os.system"
        ),
        "INST": Payload(b"(" + touch_command + b"ios\nsystem\n", "os.system"),
        "OBJ": Payload(b"(" + system + touch_command + b"o", "os.system"),
        "inside an OrderedDict": Payload(call(ordered, in_dict), "os.system"),
        "beside a good entry": Payload(
            b"}(" + text("a") + b"K\x01" + text("b") + call(system, touch_command) + b"u",
            "os.system",
        ),
        "NEWOBJ": Payload(ordered + b")\x81", "creates an object", False),
        "torch.hub.load": Payload(
            call(global_opcode("torch.hub.load"), text("a/b"), text("c")), "torch.hub.load", False
        ),
        "object dtype": Payload(
            call(global_opcode("numpy._core.multiarray.scalar"), object_dtype, touch_command),
            "'O8'",
            False,
        ),
        "codec": Payload(call(encode, touch_command, text("rot13")), "_codecs.encode", False),
        "codec lookup": Payload(
            call(global_opcode("_codecs.lookup"), text("zip")), "_codecs.lookup", False
        ),
        "BUILD on a function": Payload(rebuild + state + b"b", "sets attributes", False),
        "BUILD on a class": Payload(ordered + state + b"b", "sets attributes", False),
        "call of a storage type": Payload(
            call(global_opcode("torch.FloatStorage"), b"K\x01"), "calls a", False
        ),
        "EXT1": Payload(b"\x82\x01", "EXT1", False),
        "persistent id of a word": Payload(text("storage") + b"Q", "persistent id", False),
        "persistent id of a module": Payload(
            b"(" + text("module") + ordered + b"NNtQ", "persistent id", False
        ),
        "storage of a view": Payload(
            b"("
            + text("storage")
            + global_opcode("torch.FloatStorage")
            + text("0")
            + text("cpu")
            + b"K\x01(K\x00tt"
            + b"Q",
            "persistent id",
            False,
        ),
    }


def repeated_copies(times, items, by):
    """Returns a large memoized container that "OrderedDict" or "BUILD" copies repeatedly."""
    pairs = [b"J" + struct.pack("<i", key) + b"N" for key in range(items)]
    if by == "OrderedDict":
        large = b"](" + b"".join(pair + b"\x86" for pair in pairs) + b"e"
        head, single_copy = global_opcode("collections.OrderedDict") + b"q\x010", b"h\x01h\x00\x85R"
    else:
        large = b"}(" + b"".join(pairs) + b"u"
        head, single_copy = global_opcode("__torch__.Layer") + b"q\x010", b"h\x01)\x81h\x00b"
    return large + b"q\x000" + head + b"](" + single_copy * times + b"e"


def repeated_encoding(times, length):
    """Returns a long memoized text that _codecs.encode copies repeatedly."""
    single_copy = b"h\x01h\x00h\x02\x86R"
    head = text("x" * length) + b"q\x000" + global_opcode("_codecs.encode") + b"q\x010"
    return head + text("latin1") + b"q\x020](" + single_copy * times + b"e"


def pickled(body):
    return b"\x80\x02" + body + b"."


def in_zip(body, marker, extra=()):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(body))
        archive.writestr("archive/version", "3\n")
        for name, content in extra:
            archive.writestr(f"archive/{name}", content)
    return data.getvalue()


def in_torchscript(body, marker):
    code = f"open({str(marker)!r}, 'w')"
    extra = [("code/__torch__.py", code), ("constants.pkl", pickled(body))]
    return in_zip(body, marker, extra)


def in_legacy(body, marker):
    head = [pickle.dumps(value, protocol=2) for value in (MAGIC, PROTOCOL, SYS_INFO)]
    return b"".join(head) + pickled(body) + pickle.dumps([], protocol=2)


def raw(body, marker):
    return pickled(body)


CONTAINERS = {
    "zip": in_zip,
    "torchscript": in_torchscript,
    "legacy": in_legacy,
    "raw": raw,
}
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".npz", ".msgpack", ".safetensors")


def corrupted(data, seed, num_flips):
    """Yields truncations at many lengths, then copies with one flipped bit each."""
    import numpy as np

    random = np.random.default_rng(seed)
    lengths = sorted({*range(0, 40), *random.integers(0, len(data), 80).tolist(), len(data) - 1})
    for length in lengths:
        yield data[:length]
    for position in random.integers(0, len(data), num_flips).tolist():
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(random.integers(8))
        yield bytes(flipped)
