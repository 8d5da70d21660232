"""Packed columns, the form of every hot message: lists of integers or float32 numbers as little-endian `bytes`.

protobuf cannot check these fields, so each decoder checks length and shape, and raises ColumnError.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Literal

Code = Literal["B", "I", "Q"]

_WIDTH: dict[Code, int] = {"B": 1, "I": 4, "Q": 8}
assert all(array(code).itemsize == width for code, width in _WIDTH.items()), "unexpected C integer widths"


class ColumnError(ValueError):
    """A packed column is not what its neighbours or its width say: the stream that sent it cannot be trusted."""


def pack(values: Iterable[int], code: Code = "I") -> bytes:
    """`values` as little-endian unsigned integers of 1 (B), 4 (I) or 8 (Q) bytes; OverflowError if one does not fit."""
    column = array(code, values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def unpack(data: bytes, code: Code = "I") -> list[int]:
    """Inverse of `pack`. Raises ColumnError if the length is no multiple of the width."""
    if len(data) % _WIDTH[code]:
        raise ColumnError(f"column of {len(data)} bytes is no multiple of {_WIDTH[code]}")
    column = array(code)
    column.frombytes(data)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tolist()


def pack_floats(values: Iterable[float]) -> bytes:
    """`values` as little-endian float32."""
    column = array("f", values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def unpack_floats(data: bytes) -> tuple[float, ...]:
    """Inverse of `pack_floats`. Raises ColumnError if the length is no multiple of four."""
    if len(data) % 4:
        raise ColumnError(f"column of {len(data)} bytes is no multiple of 4")
    column = array("f")
    column.frombytes(data)
    if sys.byteorder == "big":
        column.byteswap()
    return tuple(column)


def pack_pairs(pairs: Iterable[tuple[int, int]]) -> bytes:
    """Pairs of integers, flat."""
    return pack(value for pair in pairs for value in pair)


def unpack_pairs(data: bytes) -> tuple[tuple[int, int], ...]:
    """Inverse of `pack_pairs`. Raises ColumnError if the number of values is odd."""
    values = unpack(data)
    if len(values) % 2:
        raise ColumnError(f"{len(values)} values are no pairs")
    return tuple(zip(values[::2], values[1::2], strict=True))


def pack_ragged(rows: Sequence[Sequence[int]], code: Code = "I") -> tuple[bytes, bytes]:
    """Rows of different lengths as (counts, values)."""
    return pack(len(row) for row in rows), pack((value for row in rows for value in row), code)


def unpack_ragged(counts: bytes, values: bytes, code: Code = "I") -> list[tuple[int, ...]]:
    """Inverse of `pack_ragged`. Raises ColumnError unless the counts add up to the number of values."""
    lengths, flat = unpack(counts), unpack(values, code)
    if sum(lengths) != len(flat):
        raise ColumnError(f"counts add up to {sum(lengths)}, but there are {len(flat)} values")
    rows, start = [], 0
    for length in lengths:
        rows.append(tuple(flat[start : start + length]))
        start += length
    return rows


def check_same_length(**columns: Sequence[object]) -> None:
    """Raise ColumnError, naming the columns, unless all have the same number of rows."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ColumnError(f"columns differ in length: {lengths}")
