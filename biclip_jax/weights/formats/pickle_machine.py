"""Interprets the pickles in torch files opcode by opcode; nothing is imported or executed.

A global is a name that is looked up in `_GLOBALS`; its effect on its arguments is implemented in
this file. pickle.Unpickler is not used: even with restricted globals, a few bytes make it allocate
gigabytes (a memo index) or overflow the C stack (nested tuples as a key).
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from biclip_jax.weights.formats.tensor import DTYPES, num_bytes

MAX_OPCODES = 4 * 2**20
MAX_COPIES = 2**20


class UnsupportedPickle(Exception):
    """A pickle contains something other than tensors and plain containers."""


class StorageType(NamedTuple):
    """A storage class of torch."""

    dtype: np.dtype


class Storage(NamedTuple):
    """A flat array in the file, with its key and its number of elements."""

    dtype: np.dtype
    key: str
    length: int


class View(NamedTuple):
    """A tensor: a strided view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Number of elements from the first to the last, inclusive."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))


class Function(NamedTuple):
    """A global that may be called, and what it does here."""

    call: Callable[..., Any]


class Attributes(dict[Any, Any]):
    """An object of a TorchScript class; its methods are ignored."""


# Meanings of the names in a pickle.


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    """Implements torch._utils._rebuild_tensor; checks that all elements are in the storage."""
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor without storage or offset")
    num_bytes(shape, storage.dtype)
    num_bytes(strides, storage.dtype)
    # The stride along an axis of length 1 is arbitrary.
    steps = tuple(step if n > 1 else 0 for n, step in zip(shape, strides, strict=True))
    view = View(storage, offset, tuple(shape), steps)
    if offset + view.span > storage.length:
        raise ValueError("a tensor outside its storage")
    return view


def _rebuild_v2(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """Implements torch._utils._rebuild_tensor_v2; ignores gradients, hooks and metadata."""
    if len(rest) not in (2, 3) or rest[1]:
        raise ValueError("a tensor with hooks")
    return _rebuild(storage, offset, shape, strides)


def _parameter(data: Any, *_rest: Any) -> View:
    if not isinstance(data, View):
        raise ValueError("a parameter that is not a tensor")
    return data


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in pairs}


def _encode(text: Any, encoding: Any) -> bytes:
    """Returns a placeholder for the bytes of a numpy scalar, which are not used."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise UnsupportedPickle(f"asks for _codecs.encode to {ascii(encoding)[:40]}")
    return b""


def _numpy_dtype(code: Any, *_flags: Any) -> np.dtype:
    if type(code) is not str or not re.fullmatch(r"[<=|]?[biufc](1|2|4|8|16)", code):
        raise UnsupportedPickle(
            f"asks for the numpy dtype {ascii(code)[:40]}, which is not numeric"
        )
    return np.dtype(code)


def _numpy_scalar(dtype: Any, data: Any) -> None:
    if not isinstance(dtype, np.dtype) or not isinstance(data, str | bytes):
        raise UnsupportedPickle("asks for a numpy scalar that is not a number")


def _return_first(value: Any, *_rest: Any) -> Any:
    return value


def _discard(*_args: Any) -> None:
    return None


_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _return_first,
    "torch.device": _discard,
    "torch.jit._pickle.restore_type_tag": _return_first,
    "torch.jit._pickle.build_intlist": _return_first,
    "torch.jit._pickle.build_doublelist": _return_first,
    "torch.jit._pickle.build_boollist": _return_first,
    "torch.jit._pickle.build_tensorlist": _return_first,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _discard,
    "builtins.set": _discard,
    "__builtin__.set": _discard,
    "builtins.complex": _discard,
    "__builtin__.complex": _discard,
    "builtins.bytearray": _discard,
    "__builtin__.bytearray": _discard,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
_GLOBALS: dict[str, StorageType | Function | None] = {
    **{name: StorageType(DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": None for name in DTYPES},
    **{name: Function(call) for name, call in _FUNCTIONS.items()},
}


# The pickle machine.

_MARK = object()
_SCRIPT_CLASS = object()
# Opcodes that push the number or text after them.
_PLAIN = {"int", "int_or_bool", "float", "str", "bytes", "bytes_or_str", "bytearray", "None"}
_VALUES = {
    opcode.name
    for opcode in pickletools.opcodes
    if not opcode.stack_before and {value.name for value in opcode.stack_after} & _PLAIN
}
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
# State dicts have no tensors in sets; lists in their place require no hashes.
_NEW = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}
_FROM_MARK = {"LIST": list, "TUPLE": tuple, "FROZENSET": tuple}


def interpret(pickled: io.BytesIO, storages: dict[str, Storage]) -> Any:
    """Returns the object of the next pickle; adds the storages that it names to `storages`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    num_copied = 0
    for count, (opcode, arg, _) in enumerate(pickletools.genops(pickled)):
        if count > MAX_OPCODES:
            raise ValueError("a pickle longer than any model's")
        if opcode.name == "STOP":
            break
        if opcode.name in _VALUES:
            stack.append(arg)
        elif opcode.name in ("REDUCE", "BUILD"):
            # Both copy: a large list that is referenced repeatedly would fill the memory.
            num_copied += _num_items(stack[-1])
            if num_copied > MAX_COPIES:
                raise ValueError("a pickle that copies more than any model's")
            _step(opcode.name, arg, stack, memo)
        elif opcode.name == "BINPERSID":
            stack.append(_storage(stack.pop(), storages))
        else:
            _step(opcode.name, arg, stack, memo)
    return stack.pop()


def _num_items(args: Any) -> int:
    parts = args if type(args) is tuple else (args,)
    num_nested = sum(len(part) for part in parts if isinstance(part, list | tuple | dict))
    return len(parts) + num_nested


def _step(name: str, arg: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    match name:
        case "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" | "MARK":
            stack.append(_CONSTANTS[name])
        case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_SET":
            stack.append(_NEW[name]())
        case "LIST" | "TUPLE" | "FROZENSET":
            stack.append(_FROM_MARK[name](_pop_to_mark(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack.append(tuple(reversed([stack.pop() for _ in range(int(name[-1]))])))
        case "DICT":
            stack.append(_fill({}, _pop_to_mark(stack)))
        case "PUT" | "BINPUT" | "LONG_BINPUT":
            memo[arg] = stack[-1]
        case "MEMOIZE":
            memo[len(memo)] = stack[-1]
        case "GET" | "BINGET" | "LONG_BINGET":
            stack.append(memo[arg])
        case "APPEND":
            value = stack.pop()
            _extend(stack[-1], [value])
        case "APPENDS" | "ADDITEMS":
            values = _pop_to_mark(stack)
            _extend(stack[-1], values)
        case "SETITEM":
            pair = [stack.pop(-2), stack.pop()]
            _fill(stack[-1], pair)
        case "SETITEMS":
            pairs = _pop_to_mark(stack)
            _fill(stack[-1], pairs)
        case "GLOBAL":
            stack.append(_global(arg.replace(" ", ".", 1)))
        case "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_global(f"{module}.{attribute}"))
        case "REDUCE" | "NEWOBJ" | "BUILD":
            argument = stack.pop()
            stack.append(_CALLS[name](stack.pop(), argument))
        case "INST":
            _global(arg.replace(" ", ".", 1))
            raise UnsupportedPickle("uses the opcode INST")
        case "PROTO" | "FRAME":
            pass
        case "POP":
            stack.pop()
        case "DUP":
            stack.append(stack[-1])
        case _:
            raise UnsupportedPickle(f"uses the opcode {name}")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    values: list[Any] = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _extend(target: Any, values: list[Any]) -> None:
    if type(target) is not list:
        raise UnsupportedPickle(f"appends to a {kind_of(target)}")
    target.extend(values)


def _fill(target: Any, pairs: list[Any]) -> Any:
    if not isinstance(target, dict):
        raise UnsupportedPickle(f"sets items of a {kind_of(target)}")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        target[_key(key)] = value
    return target


def _key(key: Any) -> Any:
    # The hash of a tuple of tuples of ... would overflow the C stack.
    if not isinstance(key, str | int | float | bytes | None):
        raise UnsupportedPickle(f"has a {kind_of(key)} as a key")
    return key


def _global(name: str) -> Any:
    if name.startswith("__torch__."):
        return _SCRIPT_CLASS
    if name not in _GLOBALS:
        shown = ascii(name)[1:-1][:100]
        raise UnsupportedPickle(f"asks for {shown}, which is not a tensor or a plain container")
    return _GLOBALS[name]


def _reduce(function: Any, args: Any) -> Any:
    if not isinstance(function, Function) or type(args) is not tuple:
        raise UnsupportedPickle(f"calls a {kind_of(function)}")
    return function.call(*args)


def _new_object(kind: Any, args: Any) -> Attributes:
    if kind is not _SCRIPT_CLASS or args != ():
        raise UnsupportedPickle(f"creates an object of a {kind_of(kind)}")
    return Attributes()


def _build(target: Any, state: Any) -> Any:
    if isinstance(target, Attributes) and type(state) is dict:
        target.update(state)
    elif type(target) is not dict and not isinstance(target, np.dtype):
        # Attributes of an OrderedDict are its _metadata; those of a numpy dtype, its byte order.
        raise UnsupportedPickle(f"sets attributes of a {kind_of(target)}")
    return target


_CALLS = {"REDUCE": _reduce, "NEWOBJ": _new_object, "BUILD": _build}


def _storage(identity: Any, storages: dict[str, Storage]) -> Storage:
    """Reads a persistent id: ("storage", type, key, device, length), plus None in old files."""
    match identity:
        case ("storage", StorageType(dtype), str(key), str(), int(length), *rest):
            storage = Storage(dtype, key, length)
        case _:
            raise UnsupportedPickle("has a persistent id that is not a storage")
    if rest not in ([], [None]) or length < 0:
        raise UnsupportedPickle("has a persistent id that is a view of a storage")
    if storages.setdefault(key, storage) != storage:
        raise ValueError("a storage of two sizes or dtypes")
    return storage


def kind_of(value: Any) -> str:
    """Returns the kind of a value, for error messages."""
    return "global" if isinstance(value, Function) else type(value).__name__.lstrip("_")
