"""Every op is tested by the same tests in plain torch, in C++ for every instruction set of this processor, and as
Triton source in Triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET=1 when Triton is imported, for the whole process. So a run of these files
tests plain torch, with the variable set it tests Triton, and `test_interpreter.py` makes every plain run start such a
run in a process of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kernel_checks import TRITON
from trivium_kernels.cpu import _native
from trivium_kernels.dispatch import Kernels, native_kernels, select_kernels, torch_kernels

_native.set_num_threads(2)


def _instruction_sets() -> Iterator[str]:
    usual = _native.instruction_set()
    for name in ("base", "avx2", "avx512"):
        with contextlib.suppress(ValueError):
            _native.use_instruction_set(name)
            yield name
    _native.use_instruction_set(usual)


INSTRUCTION_SETS = tuple(_instruction_sets())

if TRITON:
    np.seterr(all="ignore")  # a GPU does not warn about infinities either


@pytest.fixture(params=["triton"] if TRITON else ["torch", *INSTRUCTION_SETS])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    if request.param == "triton":
        yield select_kernels(torch.device("cuda"))
    elif request.param == "torch":
        yield torch_kernels()
    else:
        usual = _native.instruction_set()
        _native.use_instruction_set(request.param)
        found = native_kernels()
        assert found is not None, "the extension is imported above"
        yield found
        _native.use_instruction_set(usual)


@pytest.fixture(autouse=True)
def no_access_beside_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    if TRITON:
        from memory_guard import MemoryGuard  # Triton is imported only where it is interpreted

        MemoryGuard(monkeypatch)


@pytest.fixture(autouse=True)
def fresh_memory_holds_nan() -> Iterator[None]:
    """What a kernel forgets to write is no number, and no integer that could be meant."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
