"""What a kernel is measured on: inputs, the right result, the least that any way must do, and what torch does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Case:
    """run: the kernel; its result, or what it has changed. expected: the same in float64, called before `run`.

    peer: torch's own way, if there is one. num_bytes, num_flops: the least that any way reads and writes, and computes.
    tolerance: the largest error, as a share of the largest number of the result; 0 for whole numbers.
    """

    shape: str
    run: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    num_bytes: int
    peer: Callable[[], object] | None = None
    num_flops: int = 0
    tolerance: float = 2**-7


class Inputs:
    """Random tensors on one device, the same in every run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def normal(self, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def below(self, limit: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, limit, shape, device=self.device, dtype=dtype)

    def different(self, count: int, limit: int) -> Tensor:
        """[count] int64 numbers below `limit`, none twice."""
        return torch.randperm(limit, device=self.device)[:count]


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def after(change: Callable[[], object], result: Tensor) -> Callable[[], Tensor]:
    """A run that changes `result` in place."""

    def run() -> Tensor:
        change()
        return result

    return run
