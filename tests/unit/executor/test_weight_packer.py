"""Layers whose weights stay packed, against the float64 weights that they stand for, by the ops in plain torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import packers
from kernel_checks import randn
from packers import Packer
from quantized_checkpoints import FORMATS
from trivium.executor.gpu_linear import ByteProduct, FloatProduct, Int4Product, StackedProduct
from trivium.executor.linear import Product
from trivium.executor.model_config import JsonConfig
from trivium.executor.quantization.config import read_quantization
from trivium.executor.quantization.grouped_weight import GroupedWeight, scaled_weight
from trivium.executor.weight_packer import PackedLayer, StoredPart, WeightPacker
from trivium_kernels.dispatch import torch_kernels

CPU = torch.device("cpu")
IN_FEATURES = 96
WIDTHS = (48, 16, 16)  # of layers that are stacked: queries, keys, values
UNPACKED = ("gptq-8bit", "fp8-block", "ct-int8-packed", "ct-int8-asym", "ct-fp8-block")
BYTES = (
    *("gptq-8bit-channel", "gptq-8bit-128", "ct-int8", "ct-int8-packed-128"),
    *("fp8-tensor", "fp8-channel", "fp8-block-128", "ct-fp8-tensor", "ct-fp8-channel"),
)


class Tensors:
    """A checkpoint of one layer, "l"."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {f"l.{name}": tensor for name, tensor in tensors.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def stored(self, name: str) -> Tensor:
        return self._tensors[name]


def stored(
    form: str, out_features: int, seed: int, pack: Packer | None = None, *, in_features: int = IN_FEATURES
) -> tuple[GroupedWeight, Tensor]:
    """(a layer in this format, the float64 weight that it stands for)"""
    config, usual = FORMATS[form]
    tensors, meaning = (pack or usual)(randn(out_features, in_features, seed=seed).double().numpy())
    quantization = read_quantization(JsonConfig({"quantization_config": config}), Path("."))
    assert quantization is not None
    return quantization.weight("l", in_features, Tensors(tensors)), torch.from_numpy(np.array(meaning))


def stored_layers(form: str) -> tuple[list[GroupedWeight], list[Tensor]]:
    pairs = [stored(form, width, seed) for seed, width in enumerate(WIDTHS)]
    return [weight for weight, _ in pairs], [meaning for _, meaning in pairs]


def packer() -> WeightPacker:
    kernels = torch_kernels()
    return WeightPacker(kernels.int4_linear, kernels.byte_linear, CPU, torch.float32)


def pack(weights: Sequence[Tensor | GroupedWeight], bias: Tensor | None = None) -> PackedLayer:
    return packer().pack([StoredPart(f"l{index}", weight) for index, weight in enumerate(weights)], bias)


def assert_multiplies(layer: PackedLayer, meaning: Tensor, bias: Tensor | None = None) -> None:
    assert layer.shape == tuple(meaning.shape)
    for num_rows in (1, 3):
        x, add = randn(num_rows, meaning.shape[1], seed=7), randn(num_rows, len(meaning), seed=8)
        expected = x.double() @ meaning.T + (0 if bias is None else bias.double())
        torch.testing.assert_close(layer.product(x).double(), expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(layer.product(x, add).double(), expected + add, atol=2e-5, rtol=1e-5)


def kinds(product: Product) -> list[type]:
    return [type(part) for part in (product.parts if isinstance(product, StackedProduct) else (product,))]


@pytest.mark.parametrize("form", FORMATS)
def test_stacked_layers_mean_what_they_say(form: str) -> None:
    weights, meanings = stored_layers(form)
    bias = randn(sum(WIDTHS), seed=9)
    layer = pack(weights, bias)
    assert_multiplies(layer, torch.cat(meanings), bias)
    assert_multiplies(pack(weights), torch.cat(meanings))
    if form in UNPACKED:
        assert kinds(layer.product) == [FloatProduct]
    elif form in BYTES:
        assert kinds(layer.product) == [ByteProduct]
    else:
        assert kinds(layer.product) == [Int4Product] * (3 if form == "gptq-own-order" else 1)


@pytest.mark.parametrize("form", FORMATS)
def test_parts_of_layers_mean_what_they_say(form: str) -> None:
    """Rows from several places, as a rank has of queries, keys and values; inputs that begin and end within groups."""
    (weight, *_), (meaning, *_) = stored_layers(form)
    rows = (slice(8, 24), slice(0, 8), slice(40, 48))
    assert_multiplies(pack([weight.rows(rows)]), torch.cat([meaning[each] for each in rows]))
    for columns in (slice(0, 48), slice(48, 96), slice(24, 72)):
        assert_multiplies(pack([weight.columns(columns)]), meaning[:, columns])
        assert_multiplies(
            pack([weight.rows(rows[:2]).columns(columns)]), torch.cat([meaning[8:24], meaning[:8]])[:, columns]
        )


@pytest.mark.parametrize("form", ["gptq-32", "gptq-ordered", "awq-32"])
def test_a_part_has_the_groups_of_its_inputs_only(form: str) -> None:
    (weight, *_), _ = stored_layers(form)
    part = weight.columns(slice(0, 32))
    assert part.num_groups == (3 if form == "gptq-ordered" else 1)


def test_layers_with_the_same_order_of_activation_are_one_product() -> None:
    """And those in between, with another one, a product of their own."""
    first, second = stored("gptq-ordered", 16, 1), stored("gptq-ordered", 24, 2)
    other = stored("gptq-ordered", 8, 3, packers.gptq(own_order=True, symmetric=False))
    bias = randn(72, seed=9)
    pairs = [first, second, other, second]
    layer = pack([weight for weight, _ in pairs], bias)
    assert_multiplies(layer, torch.cat([meaning for _, meaning in pairs]), bias)
    assert isinstance(layer.product, StackedProduct)
    assert [part.weight.out_features for part in layer.product.parts if isinstance(part, Int4Product)] == [40, 8, 24]


@pytest.mark.parametrize("form", ["awq-32", "fp8-tensor", "fp8-block"])
def test_layers_of_floats_stay_in_their_places(form: str) -> None:
    (weight, meaning), floats = stored(form, 16, 1), randn(24, IN_FEATURES, seed=2)
    bias = randn(56, seed=9)
    layer = pack([weight, floats.half(), weight], bias)
    assert_multiplies(layer, torch.cat([meaning, floats.half().double(), meaning]), bias)
    packed = FloatProduct if form == "fp8-block" else (Int4Product if form == "awq-32" else ByteProduct)
    assert kinds(layer.product) == ([FloatProduct] if form == "fp8-block" else [packed, FloatProduct, packed])


@pytest.mark.parametrize("form", ["fp8-block-128", "gptq-8bit-128", "ct-int8-packed-128"])
def test_scales_of_128_inputs_stay_with_their_bytes(form: str) -> None:
    """Blocks that end within layers, and parts of inputs: those that begin with a block stay packed."""
    pairs = [stored(form, width, seed, in_features=320) for seed, width in enumerate((48, 200))]
    bias = randn(248, seed=9)
    layer = pack([weight for weight, _ in pairs], bias)
    assert_multiplies(layer, torch.cat([meaning for _, meaning in pairs]), bias)
    assert kinds(layer.product) == [ByteProduct]
    weight, meaning = pairs[1]
    rows = (slice(120, 136), slice(8, 16))
    for columns, kind in ((slice(128, 320), ByteProduct), (slice(0, 160), ByteProduct), (slice(64, 320), FloatProduct)):
        layer = pack([weight.rows(rows).columns(columns)])
        assert_multiplies(layer, torch.cat([meaning[each] for each in rows])[:, columns])
        assert kinds(layer.product) == [kind]


@pytest.mark.parametrize(("bits", "kind"), [(8, ByteProduct), (4, Int4Product)])
def test_zero_points_of_outputs_serve_all_their_blocks(bits: int, kind: type) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-8, 8, (3, 300), dtype=torch.int8, generator=generator)
    zeros = torch.tensor([[-8], [0], [7]], dtype=torch.int8)
    scales = torch.rand((1, 3), generator=generator)
    weight = scaled_weight("l", values, scales, (4, 128), zeros, bits=bits)
    meaning = (values.double() - zeros.double()) * scales.double().repeat_interleave(128, 1)[:, :300]
    assert_multiplies(pack([weight]), meaning)
    assert_multiplies(pack([weight.columns(slice(128, 300))]), meaning[:, 128:])
    assert kinds(pack([weight]).product) == [kind]


def test_bytes_with_and_without_scales_of_blocks_are_products_of_their_own() -> None:
    pairs = [
        stored(form, 16, 1, in_features=320) for form in ("fp8-tensor", "fp8-block-128", "fp8-block-128", "ct-int8")
    ]
    layer = pack([weight for weight, _ in pairs])
    assert_multiplies(layer, torch.cat([meaning for _, meaning in pairs]))
    assert kinds(layer.product) == [ByteProduct] * 3


def test_integers_of_eight_bits_that_fit_a_byte_without_their_zero_points_stay_packed() -> None:
    values = torch.tensor([[3, 130, 255], [0, 100, 200]], dtype=torch.uint8)
    zeros, scales = torch.tensor([[131], [100]]), torch.tensor([[0.5], [0.25]])
    weight = GroupedWeight(8, values, zeros, scales, torch.zeros(3, dtype=torch.long))
    layer = pack([weight])
    assert_multiplies(layer, torch.tensor([[-64.0, -0.5, 62.0], [-25.0, 0.0, 25.0]]).double())
    assert kinds(layer.product) == [ByteProduct]


@pytest.mark.parametrize("zeros", [0, torch.tensor([[-8, 7], [0, 3], [1, 2]], dtype=torch.int8)])
def test_four_bits_that_are_stored_as_bytes_with_signs_stay_packed(zeros: Tensor | int) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-8, 8, (3, 64), dtype=torch.int8, generator=generator)
    scales, groups = torch.rand((3, 2), generator=generator), torch.arange(64) // 32
    layer = pack([GroupedWeight(4, values, zeros, scales, groups)])
    steps = values.double() - (zeros if isinstance(zeros, int) else zeros.double()[:, groups])
    assert_multiplies(layer, steps * scales.double()[:, groups])
    assert kinds(layer.product) == [Int4Product]


def test_a_float8_that_is_no_number_stays_none() -> None:
    weight, _ = stored("fp8-tensor", 8, 1)
    codes = weight.values.view(torch.uint8).clone()
    codes[3, 5] = 0xFF
    broken = GroupedWeight(8, codes.view(torch.float8_e4m3fn), 0, weight.scales, weight.groups)
    layer = pack([broken])
    assert kinds(layer.product) == [FloatProduct]
    y = layer.product(torch.ones(1, IN_FEATURES))
    assert y.isnan().tolist() == [[column == 3 for column in range(8)]]


@pytest.mark.parametrize(("form", "bits"), [("gptq-32", 4), ("gptq-2bit", 4), ("fp8-channel", 8), ("gptq-8bit", 32)])
def test_bytes_are_those_of_the_packed_weight(form: str, bits: int) -> None:
    weights, _ = stored_layers(form)
    num_weights = sum(WIDTHS) * IN_FEATURES
    num_bytes = pack(weights).num_bytes
    scales = sum(weight.scales.numel() for weight in weights) * 4
    assert 0 <= num_bytes - num_weights * bits // 8 <= scales + num_weights // 3  # blocks of 128 inputs are filled up


def test_what_could_not_stay_packed_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    which = packer()
    with caplog.at_level(logging.INFO):
        for form in ("awq-32", "gptq-8bit", "gptq-8bit", "fp8-block", "ct-int8-asym", "fp8-tensor"):
            which.pack([StoredPart(form, stored(form, 16, 1)[0])], None)
        assert not caplog.messages
        which.log()
    assert caplog.messages[1] == (
        "layers unpacked to float32: gptq-8bit and 1 more (8-bit integers without a scale for each 128 inputs); "
        "fp8-block (float8_e4m3fn without a scale for each 128 inputs); ct-int8-asym (8-bit integers with zero points)"
    )
    assert caplog.messages[0].startswith("packed layers: 1 in int4, 1 in float8_e4m3fn, ")
