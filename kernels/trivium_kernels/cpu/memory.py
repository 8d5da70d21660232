"""Working memory that operators take again, instead of giving it back to the system.

The allocator of the system returns large pieces at once, and for the next operator the kernel finds and clears as many
pages anew: a tenth of the time of long prompts. So each thread keeps what large results of its operators have left.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LARGE_BYTES = 2**20  # smaller ones are kept by the allocator itself
MAX_KEPT_BYTES = 2**29
_ALIGNMENT = 64

_Block = npt.NDArray[np.uint8]


class LentMemory:
    """Bytes that are lent to tensors, and come back when no tensor has them any more. Lends to one thread.

    max_kept_bytes: of what is not lent; more than that goes back to the system.
    """

    def __init__(self, max_kept_bytes: float = math.inf) -> None:
        self._kept: list[_Block] = []
        self._max_kept_bytes = max_kept_bytes

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        block = self._take(num_bytes)
        lent = block[:num_bytes]  # an object of its own, which lives as long as the tensors that have its bytes
        weakref.finalize(lent, self._keep, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def _take(self, num_bytes: int) -> _Block:
        fitting = [place for place, block in enumerate(self._kept) if len(block) >= num_bytes]
        if fitting:
            return self._kept.pop(min(fitting, key=lambda place: len(self._kept[place])))
        memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        return memory[-memory.ctypes.data % _ALIGNMENT :]

    def _keep(self, block: _Block) -> None:
        """May be called by any thread."""
        if len(block) + sum(map(len, self._kept)) <= self._max_kept_bytes:
            self._kept.append(block)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.memory = LentMemory(MAX_KEPT_BYTES)


_of_thread = _OfThread()


def empty(shape: Sequence[int]) -> Tensor:
    """As `torch.empty`, of float32."""
    if 4 * math.prod(shape) < LARGE_BYTES:
        return torch.empty(shape)
    return _of_thread.memory.empty(shape, torch.float32)


@contextmanager
def lent_from(memory: LentMemory) -> Iterator[None]:
    """What `empty` gives this thread meanwhile comes from `memory` if it is large."""
    usual, _of_thread.memory = _of_thread.memory, memory
    try:
        yield
    finally:
        _of_thread.memory = usual
