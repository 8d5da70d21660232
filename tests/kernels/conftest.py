"""Every op is tested twice by the same tests: in plain torch, and as Triton source in Triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET=1 when Triton is imported, for the whole process. So a run of these files
tests plain torch, with the variable set it tests Triton, and `test_interpreter.py` makes every plain run start such a
run in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kernel_checks import TRITON
from trivium_kernels.dispatch import Kernels, select_kernels

if TRITON:
    np.seterr(all="ignore")  # a GPU does not warn about infinities either


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return select_kernels(torch.device("cuda" if TRITON else "cpu"))


@pytest.fixture(autouse=True)
def fresh_memory_holds_nan() -> Iterator[None]:
    """What a kernel forgets to write is no number, and no integer that could be meant."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
