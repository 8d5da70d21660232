"""Every packed product is the same function as `linear`, and what is chosen is used."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.executor import linear_tuning, products
from trivium.executor.linear import Linear, find_linears
from trivium.executor.linear_tuning import rank, tune
from trivium.executor.products import (
    HALF,
    INT8,
    NATIVE,
    NATIVE_BF16,
    NATIVE_BF16_PRODUCTS,
    NATIVE_FP16,
    NATIVE_INT8,
    ONEDNN,
    PLAIN,
    Packing,
)
from trivium_kernels.cpu import WeightType, can_pack

# Largest error, as a share of the largest result.
TOLERANCE = {
    PLAIN.name: 0.0,
    ONEDNN.name: 1e-6,
    HALF.name: 1e-6,
    INT8.name: 3e-2,
    NATIVE.name: 1e-6,
    NATIVE_BF16.name: 1e-6,
    NATIVE_BF16_PRODUCTS.name: 1e-2,
    NATIVE_FP16.name: 1e-6,
    NATIVE_INT8.name: 2e-2,
}
EVERYWHERE = (PLAIN, ONEDNN, HALF, INT8, NATIVE, NATIVE_BF16, NATIVE_FP16, NATIVE_INT8)
MULTIPLIES_BFLOAT16 = can_pack(WeightType.BFLOAT16_PAIRS)
ALL = (*EVERYWHERE, NATIVE_BF16_PRODUCTS) if MULTIPLIES_BFLOAT16 else EVERYWHERE


def make_weight(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """A weight that bfloat16 and float16 hold exactly, and a bias."""
    generator = torch.Generator().manual_seed(out_features)
    weight = torch.randn((out_features, in_features), generator=generator).bfloat16().float()
    weight = weight.masked_fill_(weight.abs() < 1e-3, 0.0)
    return weight, torch.randn(out_features, generator=generator)


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("packing", ALL, ids=lambda packing: packing.name)
@pytest.mark.parametrize("shape", [(48, 32), (7, 129), (576, 192)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_every_packing_computes_what_linear_computes(packing: Packing, shape: tuple[int, int], has_bias: bool) -> None:
    weight, bias = make_weight(*shape)
    given_bias = bias if has_bias else None
    product = packing.pack(weight, given_bias)
    for num_rows in (1, 2, 17, 40):
        x = torch.randn((num_rows, shape[1]), generator=torch.Generator().manual_seed(num_rows))
        expected = F.linear(x, weight, given_bias)
        assert deviation(product(x), expected) <= TOLERANCE[packing.name]
        residual = torch.randn((num_rows, 2 * shape[0]), generator=torch.Generator().manual_seed(1))[:, : shape[0]]
        before = residual.clone()
        assert deviation(product(x, residual) - residual, expected) <= TOLERANCE[packing.name] + 1e-6
        assert torch.equal(residual, before)


@pytest.mark.parametrize("packing", [None, *ALL], ids=lambda packing: packing.name if packing else "none")
def test_no_rows_give_no_rows(packing: Packing | None) -> None:
    linear = Linear(*make_weight(48, 32))
    if packing:
        linear.use(packing.pack(linear.dense_weight(), linear.bias))
    assert linear(torch.ones((0, 32))).shape == (0, 48)


def test_tuning_keeps_the_function_and_gives_the_weights_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    linears = [Linear(*make_weight(256, 160)), Linear(make_weight(8, 8)[0])]
    x = torch.randn((3, 160)), torch.randn((3, 8))
    before = [linear(rows) for linear, rows in zip(linears, x, strict=True)]
    tune(linears, allow_half=True, quantization=None)
    for linear, rows, expected in zip(linears, x, before, strict=True):
        assert deviation(linear(rows), expected) <= 1e-6
        assert linear.weight is None
    assert "linear layers: " in caplog.text


def test_a_weight_that_16_bits_cannot_hold_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_tuning, "_MIN_TRIED_ELEMENTS", 0)
    monkeypatch.setattr(linear_tuning, "rank", lambda shapes, packings: dict.fromkeys(shapes, tuple(packings[::-1])))
    for number in (1e6 + 1, 1.0 + 2**-12):
        weight = torch.zeros((256, 160))
        weight[3, 5] = number
        linear = Linear(weight)
        tune([linear], allow_half=True, quantization=None)
        x = torch.ones((2, 160))
        assert torch.equal(linear(x), F.linear(x, weight))


def test_int8_quantizes_every_layer() -> None:
    weights = [make_weight(256, 160)[0], make_weight(8, 8)[0]]
    linears = [Linear(weight) for weight in weights]
    tune(linears, allow_half=False, quantization="int8")
    for linear, weight in zip(linears, weights, strict=True):
        x = torch.randn((3, weight.shape[1]))
        assert 0 < deviation(linear(x), F.linear(x, weight)) <= TOLERANCE["int8"]


def test_products_of_bfloat16_only_where_the_processor_has_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(weight: Tensor, bias: Tensor | None) -> products.Product:
        raise NotImplementedError("this processor lacks the instructions")

    weight, bias = make_weight(256, 160)
    x = torch.randn((3, 160))
    expected = F.linear(x, weight, bias)
    if MULTIPLIES_BFLOAT16:
        linear = Linear(weight, bias)
        tune([linear], allow_half=True, quantization=None, in_bfloat16=True)
        assert 1e-4 < deviation(linear(x), expected) <= TOLERANCE[NATIVE_BF16_PRODUCTS.name]
    name = NATIVE_BF16_PRODUCTS.name
    monkeypatch.setattr(linear_tuning, "NATIVE_BF16_PRODUCTS", Packing(name, missing, 2, 2e-2))
    linear = Linear(weight, bias)
    tune([linear], allow_half=True, quantization=None, in_bfloat16=True)
    assert deviation(linear(x), expected) <= 1e-6
    assert f"no {name} on this machine: this processor lacks the instructions" in caplog.text


def test_a_missing_operator_is_reported_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(weight: Tensor, bias: Tensor | None) -> products.Product:
        raise AttributeError("no such operator")

    for name in ("NATIVE", "NATIVE_INT8", "ONEDNN", "INT8"):
        packing = getattr(products, name)
        broken = Packing(packing.name, missing, packing.weight_bytes, packing.tolerance)
        monkeypatch.setattr(linear_tuning, name, broken)
    for quantization in (None, "int8"):
        weight, bias = make_weight(256, 160)
        linear = Linear(weight, bias)
        tune([linear], allow_half=False, quantization=quantization)
        x = torch.randn((3, 160))
        assert torch.equal(linear(x), F.linear(x, weight, bias))
    for name in ("onednn", "int8", "native float32", "native int8"):
        assert f"no {name} on this machine: no such operator" in caplog.text


def test_an_operator_that_computes_something_else_is_not_used() -> None:
    def wrong(weight: Tensor, bias: Tensor | None) -> products.Product:
        return lambda x, add=None: F.linear(x, weight, bias) * 1.01

    assert products.why_unavailable(Packing("wrong", wrong, 4, 1e-5)) == "its results are wrong by 1.0e-02"
    assert all(products.why_unavailable(packing) is None for packing in ALL)


def test_the_fastest_of_the_trials_is_chosen() -> None:
    def slow(weight: Tensor, bias: Tensor | None) -> products.Product:
        return lambda x, add=None: torch.stack([F.linear(x, weight, bias) for _ in range(8)])[0]

    never = Packing("slow", slow, 4, 0.0)
    assert rank([(256, 160), (512, 64)], [never, PLAIN]) == dict.fromkeys([(256, 160), (512, 64)], (PLAIN, never))


class Int4:
    """A stored weight that is not a tensor."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.shape = (weight.shape[0], weight.shape[1])

    def dequantize(self) -> Tensor:
        return self._weight.clone()


def test_a_stored_weight_is_dequantized_until_it_is_packed() -> None:
    weight, bias = make_weight(256, 160)
    linear = Linear(Int4(weight), bias)
    x = torch.randn((3, 160))
    assert torch.equal(linear(x), F.linear(x, weight, bias))
    tune([linear], allow_half=True, quantization=None)
    assert deviation(linear(x), F.linear(x, weight, bias)) <= 1e-6


def test_linears_are_found_once_wherever_a_graph_holds_them() -> None:
    first, second = Linear(make_weight(8, 8)[0]), Linear(make_weight(8, 8)[0])
    assert find_linears(([first, {"key": second}], first, None)) == [first, second]
