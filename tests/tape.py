"""Recorded graphs without a GPU: what a CUDA graph would keep of a step, and nothing else. Imports Triton.

A Tape writes down every operator and every launch of a kernel with the tensors that it had, and does exactly that
again: the same addresses, the same numbers of the host. A tensor that the recorded work did not make itself is held as
a graph holds it, not at all: if nobody else keeps it, its memory has other things in it when the graph is replayed,
which is an AssertionError here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor


class Tape(TorchDispatchMode):
    """One recording, made while it is the active mode."""

    def __init__(self) -> None:
        super().__init__()
        self._entries: list[tuple[Callable[..., Any], Any, Any, Any]] = []  # (function, args, kwargs, result)
        self._own: dict[int, Tensor] = {}
        self._is_launching = False
        self.output: Tensor

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_launching:
            self._write_down(func, args, kwargs or {}, result)
        return result

    def launch(self, executor: GridExecutor, args: Any, kwargs: Any) -> None:
        """A launch of a kernel, which the interpreter makes of many operators that a graph does not have."""
        self._is_launching = True
        try:
            LAUNCH(executor, *args, **kwargs)
        finally:
            self._is_launching = False
        self._write_down(LAUNCH, (executor, *args), kwargs, None)

    def replay(self) -> Tensor:
        for function, args, kwargs, result in self._entries:
            again = function(*tree_map(_alive, args), **tree_map(_alive, kwargs))
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.output

    def _write_down(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        self._entries.append((function, tree_map(self._held, args), tree_map(self._held, kwargs), result))
        self._own.update((id(leaf), leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))

    def _held(self, leaf: Any) -> Any:
        is_stranger = isinstance(leaf, Tensor) and id(leaf) not in self._own
        return weakref.ref(leaf) if is_stranger else leaf


LAUNCH = GridExecutor.__call__


def _alive(leaf: Any) -> Any:
    if not isinstance(leaf, weakref.ref):
        return leaf
    tensor = leaf()
    assert tensor is not None, "a recorded step reads a tensor that is gone: it was in no buffer of its own"
    return tensor


class TapeRecorder:
    """As `CudaGraphRecorder`, with tapes. tapes: those recorded; num_replays: of all together."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.num_replays = 0

    def record(self, work: Callable[[], Tensor]) -> TapeRecorder._Counted:
        work()
        tape = Tape()
        GridExecutor.__call__ = lambda executor, *args, **kwargs: tape.launch(executor, args, kwargs)
        try:
            with tape:
                tape.output = work()
        finally:
            GridExecutor.__call__ = LAUNCH
        tape.output.fill_(-7)  # recording computes nothing
        self.tapes.append(tape)
        return self._Counted(self, tape)

    class _Counted:
        def __init__(self, recorder: TapeRecorder, tape: Tape) -> None:
            self._recorder = recorder
            self._tape = tape

        def replay(self) -> Tensor:
            self._recorder.num_replays += 1
            return self._tape.replay()
