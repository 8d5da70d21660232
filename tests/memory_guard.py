"""Makes Triton's interpreter refuse what would be an illegal address on a GPU. Imports Triton.

The interpreter reads and writes the memory of this process, so an access beside a tensor, which a mask should have
hidden, goes unnoticed. Here every access of a launch must lie within one of the tensors that were passed to it. Relies
on the interpreter's internals, as of the Triton in constraints.txt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter


class MemoryGuard:
    """Knows the memory of the launch that runs: (first byte, byte behind the last one) of each of its tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._extents: list[tuple[int, int]] = []
        self._watch_launches(monkeypatch)
        for name, pointers, mask in (
            ("create_masked_load", 0, 1),
            ("create_masked_store", 0, 2),
            ("create_atomic_rmw", 1, 3),
        ):
            self._watch_accesses(monkeypatch, name, pointers, mask)

    def _watch_launches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        convert, launch = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

        def watched_convert(argument: Any) -> Any:
            if isinstance(argument, Tensor):
                self._extents.append(extent(argument))
            return convert(argument)

        def watched_launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._extents.clear()
            launch(executor, *args, **kwargs)

        monkeypatch.setattr(interpreter, "_implicit_cvt", watched_convert)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched_launch)

    def _watch_accesses(self, monkeypatch: pytest.MonkeyPatch, name: str, pointers: int, mask: int) -> None:
        """pointers, mask: the places of these arguments of the interpreter's operation `name`."""
        access = getattr(interpreter.InterpreterBuilder, name)

        def watched_access(builder: Any, *args: Any) -> Any:
            self._check(name, args[pointers], np.asarray(args[mask].data, np.bool_))
            return access(builder, *args)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, watched_access)

    def _check(self, name: str, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
        if not addresses.size:
            return
        first, last = int(addresses.min()), int(addresses.max())
        end = last + max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if not any(low <= first and end <= high for low, high in self._extents):
            raise IndexError(f"{name} at {first:#x} to {end:#x}, which is in no tensor of the launch")


def extent(tensor: Tensor) -> tuple[int, int]:
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
