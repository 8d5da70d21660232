"""byte_linear against the float64 weights that int8 and float8 checkpoints stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_checks import DTYPES, assert_near, only_triton, randn
from packers import fp8
from trivium_kernels.byte_linear import SCALE_BLOCK, ByteWeight
from trivium_kernels.dispatch import Kernels


def make_weight(kind: str, out_features: int, in_features: int) -> tuple[ByteWeight, Tensor]:
    weight = randn(out_features, in_features, seed=5)
    if kind == "int8":
        values, scales = _rounded(weight)
        return ByteWeight(values, scales), values.double() * scales.double()[:, None]
    if kind == "int8 blocks":
        blocks = [
            ByteWeight(*_rounded(weight[:, start : start + SCALE_BLOCK]))
            for start in range(0, in_features, SCALE_BLOCK)
        ]
        meaning = torch.cat([block.values.double() * block.scales.double()[:, None] for block in blocks], dim=1)
        values = torch.cat([block.values for block in blocks], dim=1)
        return ByteWeight(values, torch.stack([block.scales for block in blocks])), meaning
    tensors, packed = fp8(scales=kind, block=(64, SCALE_BLOCK))(weight.double().numpy())
    if kind == "block":
        scales = tensors["weight_scale"].T.repeat_interleave(64, 1)[:, :out_features].contiguous()
        return ByteWeight(tensors["weight"], scales), torch.from_numpy(packed)
    return ByteWeight(tensors["weight"], tensors["weight_scale"].reshape(-1)), torch.from_numpy(packed)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(1) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 17, 65])  # one tile of rows, two, and the way of many rows
@pytest.mark.parametrize("kind", ["int8", "int8 blocks", "tensor", "channel", "block"])
@pytest.mark.parametrize(("out_features", "in_features"), [(72, 300), (5, 17)])
def test_byte_linear(
    kernels: Kernels, kind: str, out_features: int, in_features: int, num_rows: int, dtype: torch.dtype
) -> None:
    weight, meaning = make_weight(kind, out_features, in_features)
    x, bias = randn(num_rows, in_features, dtype=dtype), randn(out_features, dtype=dtype)
    y = kernels.byte_linear(x, weight, bias if num_rows > 1 else None)
    assert y.dtype == dtype
    expected = x.double() @ meaning.T + (bias.double() if num_rows > 1 else 0)
    assert_near(y, expected, factor=2.0)


@pytest.mark.parametrize("num_rows", [1, 65])
def test_every_float8_is_itself(kernels: Kernels, num_rows: int) -> None:
    """All 254 numbers of the type, the smallest ones too, each picked by a row of the identity."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    values = numbers.repeat(4, 1).T.contiguous()  # [254, 4]
    y = kernels.byte_linear(torch.eye(4).repeat(num_rows, 1)[:num_rows], ByteWeight(values, torch.ones(1)))
    assert torch.equal(y[0], numbers.float())


@only_triton
def test_a_row_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    weight, _ = make_weight("int8", 72, 300)
    x = randn(20, 300)
    together = kernels.byte_linear(x, weight)
    assert all(torch.equal(kernels.byte_linear(x[row : row + 1], weight)[0], together[row]) for row in (0, 15, 19))


def test_no_rows(kernels: Kernels) -> None:
    weight, _ = make_weight("int8", 8, 32)
    assert kernels.byte_linear(randn(0, 32), weight).shape == (0, 8)
