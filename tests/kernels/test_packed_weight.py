"""PackedWeight of every type, for every instruction set of this processor, against products in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from kernel_checks import TRITON, assert_near, randn
from kernels.conftest import INSTRUCTION_SETS
from trivium_kernels.cpu import PackedWeight, WeightType, _native, can_pack

pytestmark = pytest.mark.skipif(TRITON, reason="of the C++ kernels")

SHAPES = [(1, 1), (5, 3), (16, 8), (33, 7), (48, 129), (100, 64), (192, 577)]  # (out_features, in_features)
ROWS = [1, 2, 3, 5, 7, 12, 13, 25, 40]
DTYPES = {
    WeightType.FLOAT32: torch.float32,
    WeightType.BFLOAT16: torch.bfloat16,
    WeightType.FLOAT16: torch.float16,
}
MISSING = {
    ("base", WeightType.FLOAT16),
    ("base", WeightType.INT8),
    ("base", WeightType.BFLOAT16_PAIRS),
    ("avx2", WeightType.BFLOAT16_PAIRS),
}
if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
    MISSING.add(("avx512", WeightType.BFLOAT16_PAIRS))


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    usual = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(usual)


def need(weight_type: WeightType) -> None:
    if not can_pack(weight_type):
        assert (_native.instruction_set(), weight_type) in MISSING, "every other combination is there"
        pytest.skip("no instructions for it")


def padded(x: Tensor) -> Tensor:
    """`x` as a view of something wider: rows do not lie one behind the other."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), torch.nan)
    wide[:, 2 : 2 + x.shape[1]] = x
    return wide[:, 2 : 2 + x.shape[1]]


@pytest.mark.parametrize("weight_type", list(DTYPES), ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_any_number_of_rows(weight_type: WeightType, shape: tuple[int, int]) -> None:
    need(weight_type)
    weight = randn(*shape).to(DTYPES[weight_type]).float()
    bias = randn(shape[0], seed=1)
    plain, biased = PackedWeight(weight, None, weight_type), PackedWeight(weight, bias, weight_type)
    for num_rows in ROWS:
        x, residual = randn(num_rows, shape[1], seed=2), randn(num_rows, shape[0], seed=3)
        expected = x.double() @ weight.double().T
        assert_near(plain(padded(x)), expected, factor=4)
        assert_near(biased(x), expected + bias, factor=4)
        assert_near(biased(x, padded(residual)), expected + bias + residual, factor=4)


@pytest.mark.parametrize("weight_type", list(WeightType), ids=lambda kind: kind.name)
def test_a_row_has_the_same_bits_alone_and_beside_any_others(weight_type: WeightType) -> None:
    need(weight_type)
    packed, x = PackedWeight(randn(70, 91), None, weight_type), randn(40, 91, seed=1)
    alone = torch.cat([packed(row) for row in x.split(1)])
    for num_rows in ROWS:
        assert torch.equal(packed(x[:num_rows]), alone[:num_rows])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_sums_are_exact(shape: tuple[int, int]) -> None:
    """Against integer arithmetic on the same quantized numbers: no sum overflows, no row shares another's scale."""
    need(WeightType.INT8)
    weight, bias = randn(*shape), randn(shape[0], seed=1)
    weight[0] = weight[0].sign() * weight[0].abs().max()  # the largest products there can be
    packed = PackedWeight(weight, bias, WeightType.INT8)
    scales, quantized = quantize(weight)
    for num_rows in ROWS:
        x = randn(num_rows, shape[1], seed=2) * torch.logspace(-3, 3, num_rows)[:, None]
        x[0] = x[0].sign() * 3
        x_scales, x_quantized = quantize(x)
        exact = (x_quantized @ quantized.T).double() * x_scales * scales.T + bias
        assert_near(packed(padded(x)), exact, factor=4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_bfloat16(shape: tuple[int, int]) -> None:
    """Against products in float64 of the same rounded numbers."""
    need(WeightType.BFLOAT16_PAIRS)
    weight, bias = randn(*shape), randn(shape[0], seed=1)
    packed = PackedWeight(weight, bias, WeightType.BFLOAT16_PAIRS)
    for num_rows in ROWS:
        x, residual = randn(num_rows, shape[1], seed=2), randn(num_rows, shape[0], seed=3)
        expected = x.bfloat16().double() @ weight.bfloat16().double().T + bias
        assert_near(packed(padded(x)), expected, factor=4)
        assert_near(packed(x, padded(residual)), expected + residual, factor=4)


def test_bfloat16_keeps_what_is_not_finite() -> None:
    need(WeightType.BFLOAT16_PAIRS)
    packed, x = PackedWeight(torch.ones(40, 9), None, WeightType.BFLOAT16_PAIRS), torch.ones(3, 9)
    x[0, 8], x[1, 3] = torch.nan, torch.inf
    y = packed(x)
    assert y[0].isnan().all()
    assert y[1].eq(torch.inf).all()
    assert y[2].eq(9).all()


def test_int8_of_zeros_is_the_bias() -> None:
    need(WeightType.INT8)
    bias = randn(20)
    assert torch.equal(PackedWeight(torch.zeros(20, 9), bias, WeightType.INT8)(torch.ones(2, 9)), bias.expand(2, 20))
    assert torch.equal(PackedWeight(randn(20, 9), bias, WeightType.INT8)(torch.zeros(2, 9)), bias.expand(2, 20))


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_any_number_of_threads(num_threads: int) -> None:
    weight, x = randn(500, 300), randn(20, 300)
    packed = PackedWeight(weight, None, WeightType.FLOAT32)
    _native.set_num_threads(num_threads)
    for _ in range(50):
        assert_near(packed(x), x.double() @ weight.double().T, factor=4)
    _native.set_num_threads(2)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(scales [rows, 1] float64, integers of -127 .. 127 [rows, columns] int64)."""
    largest = x.abs().amax(dim=1, keepdim=True)
    return largest.double() / 127, (x * (127 / largest)).round().long()


def test_memory_comes_back_with_the_last_weight_of_a_chunk() -> None:
    """Chunks of 64 MiB. The first one may be shared with weights that something else in this process keeps."""
    process, weight = psutil.Process(), torch.ones(1024, 4096)  # 16 MiB
    before = process.memory_info().rss
    packed = [PackedWeight(weight, None, WeightType.FLOAT32) for _ in range(20)]
    x = torch.ones(1, 4096)
    assert process.memory_info().rss - before > 300 * 2**20
    del packed[:9], packed[-10:]  # one is left in the middle
    assert process.memory_info().rss - before < 130 * 2**20
    assert packed[0](x).eq(4096).all()
    del packed[0]
    packed += [PackedWeight(torch.ones(7, 5), None, WeightType.FLOAT32)]
    assert process.memory_info().rss - before < 70 * 2**20
    assert packed[0](torch.ones(1, 5)).eq(5).all()


def test_weight_larger_than_a_chunk() -> None:
    small = PackedWeight(torch.ones(3, 3), None, WeightType.FLOAT32)
    large = PackedWeight(torch.ones(4096, 4500), None, WeightType.FLOAT32)  # 70 MiB
    other = PackedWeight(torch.full((3, 3), 2.0), None, WeightType.FLOAT32)
    assert large(torch.ones(2, 4500)).eq(4500).all()
    del large
    assert small(torch.ones(1, 3)).eq(3).all()
    assert other(torch.ones(1, 3)).eq(6).all()
