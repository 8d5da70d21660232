"""add_stacked_lora against products of one row at a time."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import DTYPES, assert_near, only_triton, randn
from trivium_kernels.add_lora import LoraExpand, LoraWeights
from trivium_kernels.add_stacked_lora import LoraStack, new_stack, rows_by_adapter
from trivium_kernels.dispatch import Kernels

WIDTHS = (70, 9, 30)
IN_FEATURES = 600


def make_adapters(dtype: torch.dtype) -> list[LoraWeights]:
    """One that changes all parts with ranks of their own, one that changes the middle one only, one for two parts."""
    return [
        LoraWeights(
            randn(8, IN_FEATURES, dtype=dtype),
            (
                LoraExpand(0, 0, randn(70, 5, dtype=dtype)),
                LoraExpand(70, 5, randn(9, 1, dtype=dtype)),
                LoraExpand(79, 6, randn(30, 2, dtype=dtype)),
            ),
        ),
        LoraWeights(randn(3, IN_FEATURES, seed=1, dtype=dtype), (LoraExpand(70, 0, randn(9, 3, dtype=dtype)),)),
        LoraWeights(
            randn(6, IN_FEATURES, seed=2, dtype=dtype),
            (LoraExpand(0, 0, randn(70, 4, seed=1, dtype=dtype)), LoraExpand(79, 4, randn(30, 2, seed=1, dtype=dtype))),
        ),
    ]


def make_stack(dtype: torch.dtype) -> LoraStack:
    stack = new_stack(4, 6, IN_FEATURES, WIDTHS, torch.empty(0, dtype=dtype))
    for number, weights in enumerate(make_adapters(dtype)):
        stack.put(number, weights)
    return stack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [[0], [-1, -1], [2, 0, -1, 1, 0, 2, 3, 0], [1] * 20 + [-1, 0]])
def test_rows_of_several_adapters(kernels: Kernels, adapters: list[int], dtype: torch.dtype) -> None:
    x, y = randn(len(adapters), IN_FEATURES, dtype=dtype), randn(len(adapters), sum(WIDTHS), dtype=dtype)
    expected = y.double()
    for row, number in enumerate(adapters):
        for part in make_adapters(dtype)[number].expand if number in (0, 1, 2) else ():
            width, rank = part.matrix.shape
            shrink = make_adapters(dtype)[number].shrink[part.first_rank : part.first_rank + rank].double()
            expected[row, part.start : part.start + width] += part.matrix.double() @ (shrink @ x[row].double())
    kernels.add_stacked_lora(y, x, rows_by_adapter(torch.tensor(adapters), 4), make_stack(dtype))
    assert_near(y, expected, factor=2.0)


def test_an_adapter_takes_the_place_of_another(kernels: Kernels) -> None:
    stack = make_stack(torch.float32)
    stack.put(0, make_adapters(torch.float32)[1])
    y, x = torch.zeros(1, sum(WIDTHS)), randn(1, IN_FEATURES)
    kernels.add_stacked_lora(y, x, rows_by_adapter(torch.tensor([0]), 4), stack)
    assert y[0, 70:79].all()
    assert not y[0, :70].any() and not y[0, 79:].any()


@only_triton
def test_a_row_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    stack, x, adapters = make_stack(torch.float32), randn(20, IN_FEATURES), [1, 0, 2, -1] * 5
    together = torch.zeros(20, sum(WIDTHS))
    kernels.add_stacked_lora(together, x, rows_by_adapter(torch.tensor(adapters), 4), stack)
    for row in (0, 13, 18):
        alone = torch.zeros(1, sum(WIDTHS))
        rows = rows_by_adapter(torch.tensor([adapters[row]]), 4)
        kernels.add_stacked_lora(alone, x[row : row + 1], rows, stack)
        assert torch.equal(alone[0], together[row])
