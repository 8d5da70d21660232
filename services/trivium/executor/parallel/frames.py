"""Calls in a pipe: what to do, a length, and so many bytes of arguments.

Nothing heavy is imported: a rank must see the end of its pipe while it is still starting.
"""

from __future__ import annotations

import os
import select
import struct
from enum import IntEnum
from typing import IO

_HEAD = struct.Struct("<BI")  # kind, bytes that follow


class Call(IntEnum):
    """LOAD makes the ModelRunner that all later calls are methods of."""

    LOAD = 1
    PLAN = 2
    RESET = 3
    GRAMMAR = 4
    EMBED = 5
    ADAPTER = 6
    PROMPT_ADAPTER = 7


def write_call(pipe: int, call: Call, arguments: bytes, timeout_s: float) -> None:
    """Write to a pipe that does not block. Raises OSError if nobody reads it any more, or not in time."""
    data = memoryview(_HEAD.pack(call, len(arguments)) + arguments)
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    while data:
        try:
            data = data[os.write(pipe, data) :]
        except BlockingIOError:
            if not poll.poll(timeout_s * 1000):
                raise TimeoutError(f"nobody has read a call for {timeout_s:g} s") from None


def read_call(stream: IO[bytes]) -> tuple[Call, bytes] | None:
    """None at the end of the stream, also in the middle of a call."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, length = _HEAD.unpack(head)
    arguments = stream.read(length)
    return (Call(kind), arguments) if len(arguments) == length else None
