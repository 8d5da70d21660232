"""How many threads one operator uses. Operators never run side by side, so this is all the parallelism there is.

The waiting policy of OpenMP is read when torch is imported: `trivium.process.wait_passively` must run before that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from trivium.config import ExecutorConfig
from trivium.process import waits_passively

# Operators of a model this small take microseconds: handing parts of them to another thread takes longer, and when that
# thread is not running, because other processes use the core, the step waits for it (seen: 100 ms instead of 1 ms).
SMALL_MODEL_BYTES = 64 * 2**20


def choose_num_threads(config: ExecutorConfig, weight_bytes: int, num_cores: int) -> int:
    """What the settings say, else one for a small model, else an equal share of the cores.

    Of one rank of a split model, whose weights have `weight_bytes`: they share the threads of the executor equally.
    """
    if config.num_threads:
        return max(1, config.num_threads // config.tensor_parallel_size)
    if weight_bytes < SMALL_MODEL_BYTES:
        return 1
    return max(1, num_cores // (config.num_local_executors * config.tensor_parallel_size))


def set_num_threads(num_threads: int) -> None:
    """Takes effect for operators that the calling thread starts, and for no other thread.

    Beside our own threads those of torch have little to do, and where they spin between two operators, they take cores
    from ours: in a process in which torch was imported first, torch has one. (With two, 32 rows of a 135M model on two
    cores had a third thread that spun for 12 ms of each step.)
    """
    is_native = _set_native_threads(num_threads)
    torch.set_num_threads(1 if is_native and not waits_passively() else num_threads)
    if torch.get_num_interop_threads() != 1:
        with contextlib.suppress(RuntimeError):  # torch has run in parallel before: it is somebody else's process
            torch.set_num_interop_threads(1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Operators that the calling thread starts here have one thread."""
    torch_threads, native_threads = torch.get_num_threads(), _native_threads()
    torch.set_num_threads(1)
    _set_native_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        _set_native_threads(native_threads)


def _set_native_threads(num_threads: int) -> bool:
    """False: the extension was not built."""
    try:
        from trivium_kernels.cpu import _native
    except ImportError:
        return False
    _native.set_num_threads(num_threads)
    return True


def _native_threads() -> int:
    try:
        from trivium_kernels.cpu import _native
    except ImportError:
        return 1
    return _native.num_threads()


def count_cores() -> int:
    """Cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
