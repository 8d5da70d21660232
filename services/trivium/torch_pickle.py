"""The few opcodes and names that `torch.save` writes for tensors, interpreted; anything else is refused.

No object is made but numbers, strings, tuples, lists, dicts and tensors, and nothing is called by a name from the file:
names are looked up among those below, and mean what is said here. The work is linear in the length of the program.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, NoReturn

# name of a storage class -> dtype
STORAGE_DTYPES: Final = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

_PROTOCOL = 2
_MAX_INT_BYTES = 8
_MAX_STRING_BYTES = 4096
_MAX_EMPTY = 2**40  # elements of an empty tensor, if its sizes of 0 were 1


class TensorFormatError(ValueError):
    """The bytes are not a tensor in a format that is read here; the message names no path."""


class Name(Enum):
    """What a program may call."""

    REBUILD_TENSOR = auto()
    ORDERED_DICT = auto()


_NAMES: Final = {
    ("torch._utils", "_rebuild_tensor_v2"): Name.REBUILD_TENSOR,
    ("collections", "OrderedDict"): Name.ORDERED_DICT,
}
_REBUILDS_OTHERS: Final = ("torch._utils", "_rebuild_tensor_v3")  # tensors of dtypes that have no class of storage


class _Mark(Enum):
    MARK = auto()


@dataclass(frozen=True, slots=True)
class StorageType:
    """The class of a storage, as a name."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Storage:
    """`num_elements` numbers of `dtype` in the entry `key` of the file."""

    dtype: str
    key: str
    num_elements: int


@dataclass(frozen=True, slots=True)
class TensorView:
    """Element [i, j, ...] is number offset + i * strides[0] + j * strides[1] + ... of the storage; all in bounds."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def run_program(program: bytes, *, max_dims: int) -> object:
    """The value that `program` leaves: a TensorView, or a dict or other plain value with TensorViews in it.

    Raises TensorFormatError.
    """
    return _Machine(program, max_dims).run()


class _Machine:
    """The state of one run: a position in the program, a stack, and the values it has put aside."""

    def __init__(self, program: bytes, max_dims: int) -> None:
        self._program = program
        self._max_dims = max_dims
        self._position = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        if self._take(2) != bytes((0x80, _PROTOCOL)):
            _refuse(f"the pickle protocol is not {_PROTOCOL}")
        while (opcode := self._take(1)) != b".":
            action = _ACTIONS.get(opcode)
            if action is None:
                _refuse(f"opcode 0x{opcode[0]:02x} is none that tensors need")
            action(self)
        value = self.pop()
        if self._stack or self._position != len(self._program):
            _refuse("something is left over at the end")
        return value

    def push(self, value: object) -> None:
        self._stack.append(value)

    def push_int(self, layout: str) -> None:
        self.push(self._unpack(layout))

    def push_long(self) -> None:
        length = self._unpack("<B")
        if length > _MAX_INT_BYTES:
            _refuse(f"an integer of {length} bytes")
        self.push(int.from_bytes(self._take(length), "little", signed=True))

    def push_string(self) -> None:
        length = self._unpack("<I")
        if length > _MAX_STRING_BYTES:
            _refuse(f"a string of {length} bytes")
        try:
            self.push(self._take(length).decode())
        except UnicodeDecodeError:
            _refuse("a string is not UTF-8")

    def push_name(self) -> None:
        module, name = self._line(), self._line()
        if module == "torch" and name in STORAGE_DTYPES:
            self.push(StorageType(STORAGE_DTYPES[name]))
        elif (module, name) in _NAMES:
            self.push(_NAMES[module, name])
        elif (module, name) == _REBUILDS_OTHERS or (module == "torch" and name.endswith("Storage")):
            raise TensorFormatError(f"the dtype is none of {', '.join(sorted(STORAGE_DTYPES.values()))}")
        else:
            _refuse(f"the name {module!r:.40} {name!r:.40}")

    def push_tuple(self, length: int | None = None) -> None:
        """Of the last `length` values, None: of those since the mark."""
        items = self.pop_to_mark() if length is None else [self.pop() for _ in range(length)][::-1]
        self.push(tuple(items))

    def push_storage(self) -> None:
        match self.pop():
            case ("storage", StorageType(dtype), str(key), str(), int(count)) if count >= 0:
                self.push(Storage(dtype, key, count))
            case _:
                _refuse("a persistent id that is no storage")

    def keep(self, layout: str) -> None:
        self._memo[self._unpack(layout)] = self._top()

    def push_kept(self, layout: str) -> None:
        index = self._unpack(layout)
        if index not in self._memo:
            _refuse("a value that was never kept")
        self.push(self._memo[index])

    def call(self) -> None:
        arguments, called = self.pop(), self.pop()
        if called is Name.ORDERED_DICT and arguments == ():
            self.push({})
        elif called is Name.REBUILD_TENSOR and isinstance(arguments, tuple):
            self.push(self._tensor(arguments))
        else:
            _refuse("a call of something else than a tensor or an empty OrderedDict")

    def set_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            _refuse("items for something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                _refuse("a key that is no string")
            target[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def append(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            _refuse("items for something that is no list")
        target.extend(items)

    def drop_state(self) -> None:
        """Attributes of a dict: `torch.save` writes the versions of a module's parts there, which say nothing here."""
        state = self.pop()
        if not isinstance(state, dict) or not isinstance(self._top(), dict):
            _refuse("attributes of something that is no dict")

    def _tensor(self, arguments: tuple[Any, ...]) -> TensorView:
        """Arguments: storage, offset, shape, strides, and what matters for training only."""
        if not 6 <= len(arguments) <= 7 or not isinstance(arguments[0], Storage):
            _refuse("a tensor that is not made of a storage")
        storage, offset, shape, strides = arguments[:4]
        for numbers in ((offset,), shape, strides):
            if not isinstance(numbers, tuple) or not all(type(number) is int and number >= 0 for number in numbers):
                _refuse("an offset, shape or stride that is no number of elements")
        if len(shape) != len(strides) or len(shape) > self._max_dims:
            _refuse(f"a shape of {len(shape)} and strides of {len(strides)} dimensions")
        num_elements, limit = 1, _MAX_EMPTY if 0 in shape else storage.num_elements
        for size in shape:
            num_elements *= max(size, 1)
            if num_elements > limit:
                _refuse(f"shape {shape} has more elements than its storage of {storage.num_elements}")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.num_elements:
            _refuse(f"element {last} of a storage of {storage.num_elements}")
        return TensorView(storage, offset, shape, strides)

    def _take(self, length: int) -> bytes:
        taken = self._program[self._position : self._position + length]
        if len(taken) < length:
            _refuse("it ends too early")
        self._position += length
        return taken

    def _unpack(self, layout: str) -> int:
        value: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _line(self) -> str:
        end = self._program.find(b"\n", self._position, self._position + _MAX_STRING_BYTES)
        if end < 0:
            _refuse("a name without an end")
        line = self._take(end - self._position)
        self._position += 1
        return line.decode("ascii", "replace")

    def pop(self) -> Any:
        value = self._stack.pop() if self._stack else _Mark.MARK
        if value is _Mark.MARK:
            _refuse("a value is missing")
        return value

    def _top(self) -> Any:
        value = self.pop()
        self._stack.append(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        """The values since the last mark."""
        items: list[Any] = []
        while self._stack:
            value = self._stack.pop()
            if value is _Mark.MARK:
                return items[::-1]
            items.append(value)
        _refuse("a mark is missing")


def _refuse(what: str) -> NoReturn:
    raise TensorFormatError(f"not a pickled tensor: {what}")


_ACTIONS: Final[dict[bytes, Callable[[_Machine], None]]] = {
    b"(": lambda machine: machine.push(_Mark.MARK),
    b"N": lambda machine: machine.push(None),
    b"\x88": lambda machine: machine.push(True),
    b"\x89": lambda machine: machine.push(False),
    b"K": lambda machine: machine.push_int("<B"),
    b"M": lambda machine: machine.push_int("<H"),
    b"J": lambda machine: machine.push_int("<i"),
    b"\x8a": _Machine.push_long,
    b"X": _Machine.push_string,
    b"c": _Machine.push_name,
    b")": lambda machine: machine.push(()),
    b"}": lambda machine: machine.push({}),
    b"]": lambda machine: machine.push([]),
    b"t": _Machine.push_tuple,
    b"\x85": lambda machine: machine.push_tuple(1),
    b"\x86": lambda machine: machine.push_tuple(2),
    b"\x87": lambda machine: machine.push_tuple(3),
    b"Q": _Machine.push_storage,
    b"q": lambda machine: machine.keep("<B"),
    b"r": lambda machine: machine.keep("<I"),
    b"h": lambda machine: machine.push_kept("<B"),
    b"j": lambda machine: machine.push_kept("<I"),
    b"R": _Machine.call,
    b"s": _Machine.set_item,
    b"u": lambda machine: machine.set_items(machine.pop_to_mark()),
    b"a": lambda machine: machine.append([machine.pop()]),
    b"e": lambda machine: machine.append(machine.pop_to_mark()),
    b"b": _Machine.drop_state,
}
