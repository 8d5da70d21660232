"""Runs of operators that are done again with one call.

The host needs some microseconds to name an operator, and a small step has hundreds of them. A recorder runs the step
once and writes down what it does: an operator in C++ with its addresses, any function of torch as a call whose result
is copied to where it was. A replay does the same at the same addresses: what is to be different lies in tensors of the
caller, which keeps them and changes their numbers.

What a step gets from the host, or does to the memory of a tensor behind torch's back, is not seen: whoever replays has
to compare once, with other numbers, before anything depends on it.

Working memory is the recorder's. A tensor that the step lets go of gives its memory to a later one, in a replay as in
the recorded run, and to other recordings: they run one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from trivium_kernels.cpu import _native
from trivium_kernels.cpu.memory import LentMemory, lent_from

_READ_NUMBERS = frozenset(
    ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal", "allclose")
)
_ONLY_LOOK = frozenset(("__get__", "data_ptr", "stride", "size", "dim", "numel", "is_contiguous", "__len__"))

_of_thread = threading.local()


class Updatable(Protocol):
    """What is made of tensors on the host, and has to be made again when their numbers change."""

    def update(self) -> None: ...


Made = TypeVar("Made", bound=Updatable)


def updated_in_replays(make: Callable[[], Made]) -> Made:
    """What `make` makes. If this thread is recording, every replay updates it, in the place of this call."""
    tape: _Tape | None = getattr(_of_thread, "tape", None)
    if tape is None:
        return make()
    with tape.paused():
        made = make()
    tape.add(made.update)
    return made


class NativeRecording:
    """One recorded run, and the memory that it works in."""

    def __init__(self, calls: Sequence[Callable[[], object]], output: Tensor) -> None:
        self._calls = calls
        self._output = output

    def replay(self) -> Tensor:
        """Do again what was recorded. What it returns is overwritten by the next replay."""
        for call in self._calls:
            call()
        return self._output


class NativeRecorder:
    """Makes recordings that share their working memory. Of one thread."""

    def __init__(self) -> None:
        self._memory = LentMemory()

    def record(self, work: Callable[[], Tensor]) -> NativeRecording:
        """Run `work`, and write down what it does.

        It must do the same whatever numbers are in its tensors, but for what `updated_in_replays` makes. Raises
        RuntimeError if it reads a number of a tensor to go on.
        """
        tape = _Tape(self._memory)
        with tape.running():
            output = work()
        return NativeRecording(tape.calls, output)


class _Tape(TorchFunctionMode):
    """What is written down while it runs."""

    def __init__(self, memory: LentMemory) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self._memory = memory
        self._native: object = None
        self._num_called = 0  # operators in C++ that are among `calls`
        self._is_paused = False

    @contextmanager
    def running(self) -> Iterator[None]:
        self._native = _native.start_recording()
        _of_thread.tape = self
        try:
            with self, lent_from(self._memory):
                yield
        finally:
            _of_thread.tape = None
            _native.stop_recording()
        self._call_native()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Functions of torch are not written down meanwhile."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def add(self, call: Callable[[], object]) -> None:
        self._call_native()
        self.calls.append(call)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._is_paused or name in _ONLY_LOOK:
            return func(*args, **kwargs)
        if name in _READ_NUMBERS:
            raise RuntimeError(f"a step that depends on the numbers of its tensors cannot be recorded: {name}")
        if func is torch.empty and not kwargs:
            return self._memory.empty(args[0] if isinstance(args[0], (tuple, list)) else args, torch.float32)
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shared = {_memory_of(tensor) for tensor in given}
        is_new = any(_has_own_memory(leaf, shared) for leaf in tree_leaves(result))
        if is_new:
            result = tree_map(lambda leaf: self._kept(leaf) if _has_own_memory(leaf, shared) else leaf, result)
            self.add(partial(_call_again, func, args, kwargs, result))
        elif name == "__setitem__" or any(leaf is tensor for leaf in tree_leaves(result) for tensor in given):
            self.add(partial(func, *args, **kwargs))  # it may have changed what it was given
        return result

    def _kept(self, tensor: Tensor) -> Tensor:
        """`tensor` in our memory."""
        return self._memory.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def _call_native(self) -> None:
        """Have the operators that were recorded in C++ meanwhile called."""
        num_recorded = _native.num_recorded(self._native)
        if num_recorded > self._num_called:
            self.calls.append(partial(_native.replay, self._native, self._num_called, num_recorded))
            self._num_called = num_recorded


def _has_own_memory(leaf: object, shared: set[int]) -> bool:
    """Whether it is a tensor that shares no memory with those that a function was given."""
    return isinstance(leaf, Tensor) and leaf.numel() > 0 and _memory_of(leaf) not in shared


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _call_again(func: Callable[..., Any], args: Any, kwargs: Any, kept: Any) -> None:
    for old, new in zip(tree_leaves(kept), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, Tensor) and old.numel():
            old.copy_(new)
