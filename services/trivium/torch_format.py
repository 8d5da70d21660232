"""Tensors in the zip format of `torch.save`, read without torch and without unpickling.

The zip's directory is read under limits, the pickled description of the tensors by `torch_pickle.py`. Nothing is copied
and nothing is allocated for a size that the file only declares: every tensor is a view of the bytes that are there.
numpy has no bfloat16: such tensors are read as their bits.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trivium.torch_pickle import STORAGE_DTYPES, TensorFormatError, TensorView, run_program

__all__ = [
    "CHECKPOINT_LIMITS",
    "TENSOR_LIMITS",
    "StoredTensor",
    "TensorFormatError",
    "TorchLimits",
    "open_torch_checkpoint",
    "read_torch_tensor",
]

# dtype -> how it lies in memory
LAYOUTS: Final[Mapping[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float64": np.dtype("<f8"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
FLOAT_DTYPES: Final = frozenset({"float32", "float16", "bfloat16"})

_ENTRY = struct.Struct("<4s4xHH8xIIHHH8xI")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_END = struct.Struct("<4s4xHHIIH")
_END64_LOCATOR = struct.Struct("<4s4xQ4x")
_END64 = struct.Struct("<4s20xQQQQ")
_MAX_COMMENT_BYTES = 65535
_STORED = 0  # the only method: torch compresses nothing, so a bomb has no place
_ENCRYPTED_FLAG = 1
_ZIP64_FIELD = 1
_UNSET32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchLimits:
    """Bounds of one file; dtypes: of its tensors."""

    max_entries: int
    max_pickle_bytes: int
    max_dims: int
    dtypes: frozenset[str]


TENSOR_LIMITS = TorchLimits(max_entries=64, max_pickle_bytes=4096, max_dims=8, dtypes=FLOAT_DTYPES)
CHECKPOINT_LIMITS = TorchLimits(
    max_entries=1_000_000,
    max_pickle_bytes=64 * 2**20,
    max_dims=16,
    dtypes=frozenset(STORAGE_DTYPES.values()),
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """values: read-only view of the file, of any strides; those of bfloat16 are its bits as uint16."""

    dtype: str
    values: npt.NDArray[Any]

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The numbers as float32, contiguous and in native order; a view where nothing has to change."""
        return float32_of(self.dtype, self.values)


def float32_of(dtype: str, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Contiguous float32 numbers of `values`, which are of `dtype`, or its bits if that is bfloat16."""
    if dtype == "bfloat16":
        bits = np.array(values, np.uint32, order="C")
        bits <<= 16
        return bits.view(np.float32)
    return np.asarray(values, np.float32, order="C")


def read_torch_tensor(data: bytes, limits: TorchLimits = TENSOR_LIMITS) -> StoredTensor:
    """The one tensor in what `torch.save(tensor)` has written. Raises TensorFormatError."""
    archive = _Archive(memoryview(data), limits)
    value = archive.read_value()
    if not isinstance(value, TensorView):
        raise TensorFormatError("the file holds something else than one tensor")
    return archive.tensor(value)


def open_torch_checkpoint(path: Path, limits: TorchLimits = CHECKPOINT_LIMITS) -> Mapping[str, StoredTensor]:
    """name -> tensor of what `torch.save(state_dict)` has written: views of the mapped file, which stays open for them.

    Raises TensorFormatError, and OSError if the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise TensorFormatError("the file is empty") from None
    archive = _Archive(memoryview(mapped), limits)
    value = archive.read_value()
    if not isinstance(value, dict) or not all(isinstance(item, TensorView) for item in value.values()):
        raise TensorFormatError("the file holds something else than a dict of tensors")
    return {name: archive.tensor(item) for name, item in value.items()}


class _Archive:
    """A zip file: where its entries lie in `data`."""

    def __init__(self, data: memoryview, limits: TorchLimits) -> None:
        self._data = data
        self._limits = limits
        self._entries = self._read_directory(*self._find_directory())  # name -> (offset of its header, size)
        programs = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise TensorFormatError(f"a zip file with {len(programs)} entries data.pkl is none of torch.save")
        self._program = programs[0]
        self._root = programs[0].removesuffix("data.pkl")
        byte_order = self._root + "byteorder"
        if byte_order in self._entries and bytes(self._read(byte_order)) != b"little":
            raise TensorFormatError("the numbers are not little-endian")

    def read_value(self) -> object:
        """What was saved, with TensorViews for its tensors."""
        program = self._read(self._program)
        if len(program) > self._limits.max_pickle_bytes:
            raise TensorFormatError(f"a pickle of {len(program)} bytes")
        return run_program(bytes(program), max_dims=self._limits.max_dims)

    def tensor(self, view: TensorView) -> StoredTensor:
        storage = view.storage
        if storage.dtype not in self._limits.dtypes:
            raise TensorFormatError(f"the dtype is {storage.dtype}, not {', '.join(sorted(self._limits.dtypes))}")
        layout, name = LAYOUTS[storage.dtype], f"{self._root}data/{storage.key}"
        if name not in self._entries:
            raise TensorFormatError("a storage is missing")
        content = self._read(name)
        if len(content) != storage.num_elements * layout.itemsize:
            raise TensorFormatError(f"a storage of {storage.num_elements} elements has {len(content)} bytes")
        numbers = np.frombuffer(content, layout)
        if 0 in view.shape:
            return StoredTensor(storage.dtype, numbers[:0].reshape(view.shape))
        sides = zip(view.shape, view.strides, strict=True)
        strides = [stride * layout.itemsize if size > 1 else 0 for size, stride in sides]
        return StoredTensor(
            storage.dtype,
            np.lib.stride_tricks.as_strided(numbers[view.offset :], view.shape, strides, writeable=False),
        )

    def _read(self, name: str) -> memoryview:
        """The bytes of an entry."""
        offset, size = self._entries[name]
        signature, name_length, extra_length = self._unpack(_LOCAL_HEADER, offset)
        start = offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\3\4" or start + size > len(self._data):
            raise TensorFormatError("an entry of the zip file lies outside of it")
        return self._data[start : start + size]

    def _find_directory(self) -> tuple[int, int, int]:
        """(number of entries, offset, size) of the central directory."""
        length = len(self._data)
        tail_start = max(0, length - _END.size - _MAX_COMMENT_BYTES)
        found = bytes(self._data[tail_start:]).rfind(b"PK\5\6")
        if found < 0:
            raise TensorFormatError("not a zip file")
        end = tail_start + found
        _, count_here, count, size, offset, _ = self._unpack(_END, end)
        if _UNSET32 in (size, offset) or 0xFFFF in (count_here, count):
            signature, end64 = self._unpack(_END64_LOCATOR, max(0, end - _END64_LOCATOR.size))
            if signature != b"PK\6\7":
                raise TensorFormatError("the zip file lacks its 64-bit directory")
            signature, count_here, count, size, offset = self._unpack(_END64, end64)
            if signature != b"PK\6\6":
                raise TensorFormatError("the zip file lacks its 64-bit directory")
        if count != count_here or not 1 <= count <= self._limits.max_entries:
            raise TensorFormatError(f"a zip file of {count} entries")
        if offset + size > end:
            raise TensorFormatError("the directory of the zip file lies outside of it")
        return count, offset, size

    def _read_directory(self, count: int, offset: int, size: int) -> dict[str, tuple[int, int]]:
        entries: dict[str, tuple[int, int]] = {}
        end = offset + size
        for _ in range(count):
            signature, flags, method, packed, unpacked, name_length, extra_length, comment_length, header = (
                self._unpack(_ENTRY, offset)
            )
            start = offset + _ENTRY.size
            offset = start + name_length + extra_length + comment_length
            if signature != b"PK\1\2" or offset > end:
                raise TensorFormatError("the directory of the zip file is broken")
            if method != _STORED or flags & _ENCRYPTED_FLAG:
                raise TensorFormatError("an entry of the zip file is compressed or encrypted")
            extra = bytes(self._data[start + name_length : start + name_length + extra_length])
            unpacked, packed, header = _widen(extra, unpacked, packed, header)
            name = bytes(self._data[start : start + name_length]).decode("utf-8", "replace")
            if name in entries or packed != unpacked:
                raise TensorFormatError("an entry of the zip file is there twice or of two sizes")
            entries[name] = header, unpacked
        return entries

    def _unpack(self, layout: struct.Struct, offset: int) -> tuple[Any, ...]:
        if offset + layout.size > len(self._data):
            raise TensorFormatError("the zip file ends too early")
        return layout.unpack_from(self._data, offset)


def _widen(extra: bytes, *values: int) -> tuple[int, ...]:
    """`values` with those that do not fit into 32 bits from the zip64 field of `extra`, which has them in order."""
    if _UNSET32 not in values:
        return values
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if kind == _ZIP64_FIELD:
            wide = iter(struct.unpack_from(f"<{min(length, len(extra) - position) // 8}Q", extra, position))
            try:
                return tuple(next(wide) if value == _UNSET32 else value for value in values)
            except (StopIteration, RuntimeError):
                break
        position += length
    raise TensorFormatError("the zip file lacks a 64-bit size")
