"""Adapters of rank 16 in the merged projection of Llama 8B, 8 of them in a batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from gpu_kernels.case import HALF, Case, Inputs
from trivium_kernels.add_stacked_lora import LoraStack, rows_by_adapter
from trivium_kernels.dispatch import Kernels


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    widths, in_features, max_rank = ((4096, 1024, 1024), 4096, 16) if full else ((40, 9), 600, 3)
    bounds = (0, *torch.tensor(widths).cumsum(0).tolist())
    for num_rows, num_adapters in ((1, 1), (64, 1), (64, 8), (2048, 8)) if full else ((5, 2),):
        stack = LoraStack(
            inputs.normal(num_adapters, len(widths) * max_rank, in_features) / 16,
            inputs.normal(num_adapters, bounds[-1], max_rank),
            bounds,
        )
        yield _case(kernels, inputs, stack, num_rows)


def _case(kernels: Kernels, inputs: Inputs, stack: LoraStack, num_rows: int) -> Case:
    num_adapters, _, in_features = stack.shrink.shape
    adapters = torch.arange(num_rows, device=inputs.device) % num_adapters
    rows = rows_by_adapter(adapters, num_adapters)
    x, y = inputs.normal(num_rows, in_features), inputs.normal(num_rows, stack.bounds[-1])
    before, used = y.clone(), min(num_rows, num_adapters)

    def run() -> Tensor:
        y.copy_(before)  # or it would grow with every run
        kernels.add_stacked_lora(y, x, rows, stack)
        return y

    weights = used * (stack.shrink[0].numel() + stack.expand[0].numel()) * HALF.itemsize
    return Case(
        f"{num_rows} rows, {num_adapters} adapters, {in_features} -> {stack.bounds[-1]}",
        run,
        lambda: _row_by_row(before.double(), x, adapters, stack),
        x.nbytes + 4 * y.nbytes + weights,  # with the copy
        tolerance=2**-6,
    )


def _row_by_row(y: Tensor, x: Tensor, adapters: Tensor, stack: LoraStack) -> Tensor:
    for row in range(len(x)):
        shrunk = (stack.shrink[adapters[row]].double() @ x[row].double()).unflatten(0, (-1, stack.max_rank))
        for part, (start, end) in enumerate(pairwise(stack.bounds)):
            y[row, start:end] += stack.expand[adapters[row], start:end].double() @ shrunk[part]
    return y
