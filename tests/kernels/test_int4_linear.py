"""int4_linear against the float64 weights that AWQ and GPTQ checkpoints stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_checks import DTYPES, assert_near, only_triton, randn
from packers import Packer, awq, gptq
from trivium.executor.quantization.scheme import group_index, unpack
from trivium_kernels.dispatch import Kernels
from trivium_kernels.int4_linear import Int4Weight, pack_int4

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def from_awq(tensors: dict[str, Tensor], in_features: int, group_size: int) -> Int4Weight:
    values, zeros = (unpack(tensors[name], 4, AWQ_PLACES).T for name in ("qweight", "qzeros"))
    return pack_int4(values, zeros, tensors["scales"].T, group_index(in_features, group_size))


def from_gptq(tensors: dict[str, Tensor], in_features: int, group_size: int) -> Int4Weight:
    values = unpack(tensors["qweight"].T, 4)[:, :in_features]
    zeros = (unpack(tensors["qzeros"], 4).T + 1) % 16
    return pack_int4(values, zeros[: len(values)], tensors["scales"].T, tensors["g_idx"].long())


def make_weight(packer: Packer, out_features: int, in_features: int, group_size: int) -> tuple[Int4Weight, Tensor]:
    tensors, meaning = packer(randn(out_features, in_features, seed=5).double().numpy())
    make = from_gptq if "g_idx" in tensors else from_awq
    return make(tensors, in_features, group_size), torch.from_numpy(meaning)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 17, 65])  # one tile of rows, two, and the way of many rows
@pytest.mark.parametrize(
    ("packer", "out_features", "in_features", "group_size"),
    [
        (awq(group_size=32), 72, 160, 32),
        (gptq(group_size=128, symmetric=False), 72, 256, 128),
        (gptq(group_size=32, ordered=True), 72, 160, 32),
        (gptq(group_size=-1), 8, 40, -1),
        (gptq(group_size=24, ordered=True), 16, 48, 24),  # groups that are no slices, out of order
    ],
)
def test_int4_linear(
    kernels: Kernels,
    packer: Packer,
    out_features: int,
    in_features: int,
    group_size: int,
    num_rows: int,
    dtype: torch.dtype,
) -> None:
    weight, meaning = make_weight(packer, out_features, in_features, group_size)
    x, bias = randn(num_rows, in_features, dtype=dtype), randn(out_features, dtype=dtype)
    y = kernels.int4_linear(x, weight, bias if num_rows > 1 else None)
    assert y.dtype == dtype
    expected = x.double() @ meaning.T + (bias.double() if num_rows > 1 else 0)
    assert_near(y, expected, factor=2.0)


def test_one_block_of_inputs_more_than_there_can_be_parts(kernels: Kernels) -> None:
    weight, meaning = make_weight(awq(group_size=128), 8, 33 * 128, 128)
    x = randn(1, 33 * 128)
    assert_near(kernels.int4_linear(x, weight), x.double() @ meaning.T, factor=2.0)


@only_triton
def test_a_row_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    weight, _ = make_weight(awq(group_size=32), 72, 288, 32)
    x = randn(20, 288)
    together = kernels.int4_linear(x, weight)
    assert all(torch.equal(kernels.int4_linear(x[row : row + 1], weight)[0], together[row]) for row in (0, 15, 19))


def test_no_rows(kernels: Kernels) -> None:
    weight, _ = make_weight(awq(group_size=32), 8, 32, 32)
    assert kernels.int4_linear(randn(0, 32), weight).shape == (0, 8)
