"""compressed-tensors: one container for several formats; `config_groups` says which layers have which.

Packed integers: `weight_packed` int32 [out, in / per_word], the values moved up by half their range, with
`weight_scale` [out, groups], for asymmetric ones `weight_zero_point` int32 [out / per_word, groups] (moved up, too),
for those ordered by activation `weight_g_idx` [in]. Plain integers and 8-bit floats: `weight` with `weight_scale` and
maybe `weight_zero_point` of the tensor, of each output, or of each block. How activations are quantized has no effect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.quantization.fp8 import read_block
from trivium.executor.quantization.grouped_weight import GroupedWeight, grouped_weight, scaled_weight
from trivium.executor.quantization.scheme import WORD_BITS, StoredTensors, group_index, unpack

_FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense")
_BITS = {"int": (4, 8), "float": (8,)}
_STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True, slots=True)
class WeightArgs:
    """How a group of layers stores its weights; group_size is -1 for one group per output."""

    bits: int
    group_size: int
    block: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The layers that `targets` names: by name, by a pattern of names (`re:`), or all ("Linear")."""

    targets: tuple[str, ...]
    args: WeightArgs

    def names(self, layer: str) -> bool:
        return any(
            re.match(target.removeprefix("re:"), layer) if target.startswith("re:") else target == layer
            for target in self.targets
        )


@dataclass(frozen=True, slots=True)
class CompressedLayers:
    groups: tuple[LayerGroup, ...]

    def is_packed(self, layer: str, tensors: StoredTensors) -> bool:
        return f"{layer}.weight_scale" in tensors

    def weight(self, layer: str, in_features: int, tensors: StoredTensors) -> GroupedWeight:
        args = self._args(layer)
        if f"{layer}.weight_packed" in tensors:
            return _unpacked(layer, in_features, args, tensors)
        values, scale = tensors.stored(f"{layer}.weight"), tensors.stored(f"{layer}.weight_scale")
        zeros: Tensor | int = 0
        if f"{layer}.weight_zero_point" in tensors:
            zeros = tensors.stored(f"{layer}.weight_zero_point")
        if scale.dim() == 2 and scale.shape[1] > 1 and args.block is None:
            groups = group_index(in_features, args.group_size)
            return grouped_weight(layer, values, zeros, scale, groups, bits=args.bits)
        return scaled_weight(layer, values, scale, args.block, zeros, bits=args.bits)

    def _args(self, layer: str) -> WeightArgs:
        """Of the group that names the layer, else of the one for all layers."""
        for group in self.groups:
            if group.names(layer):
                return group.args
        for group in self.groups:
            if "Linear" in group.targets:
                return group.args
        raise ConfigurationError(f"{layer}: no group of quantization_config names it")


def _unpacked(layer: str, in_features: int, args: WeightArgs, tensors: StoredTensors) -> GroupedWeight:
    half, per_word = 1 << (args.bits - 1), WORD_BITS // args.bits
    values = unpack(tensors.stored(f"{layer}.weight_packed"), args.bits)  # [out, in filled up to whole words]
    if values.shape[1] != -(-in_features // per_word) * per_word:
        raise ConfigurationError(
            f"{layer}: {values.shape[1]} packed inputs of {args.bits} bits, but config.json asks for {in_features}"
        )
    values, scales = values[:, :in_features], tensors.stored(f"{layer}.weight_scale")
    if scales.dim() != 2 or scales.numel() == 1:
        scales = scales.reshape(-1, 1).expand(len(values), 1)
    zeros: Tensor | int = half
    if f"{layer}.weight_zero_point" in tensors:
        zeros = _unpacked_zeros(tensors.stored(f"{layer}.weight_zero_point"), args.bits)[: len(values)]
    groups = group_index(in_features, args.group_size)
    if f"{layer}.weight_g_idx" in tensors:
        stored = tensors.stored(f"{layer}.weight_g_idx").long()
        groups = groups if (stored < 0).any() else stored  # -1: not ordered after all
    return grouped_weight(layer, values, zeros, scales, groups, bits=args.bits)


def _unpacked_zeros(stored: Tensor, bits: int) -> Tensor:
    """[out, groups], moved up as the values are; older writers did not pack them."""
    if stored.dtype == torch.int8:
        return stored.int() + (1 << (bits - 1))
    return unpack(stored.T, bits).T


def read_compressed_tensors(config: JsonConfig) -> CompressedLayers:
    """Raises ConfigurationError for a variant that is not supported."""
    _check_format(config)
    if config.mapping("sparsity_config").get("format", "dense") != "dense":
        raise ConfigurationError(f"{config.file}: sparse compressed-tensors checkpoints are not supported")
    if config.mapping("transform_config").get("config_groups"):
        raise ConfigurationError(f"{config.file}: compressed-tensors checkpoints with transforms are not supported")
    groups = []
    for name, group in config.mapping("config_groups").items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise ConfigurationError(f"{config.file}: {name} of quantization_config says nothing about weights")
        _check_format(JsonConfig(group, config.file))
        targets = tuple(str(target) for target in group.get("targets", ()))
        groups.append(LayerGroup(targets, _read_args(JsonConfig(group["weights"], config.file), name)))
    if not groups:
        raise ConfigurationError(f"{config.file}: quantization_config has no config_groups")
    return CompressedLayers(tuple(groups))


def _check_format(config: JsonConfig) -> None:
    form = config.string("format", "dense")
    if form not in _FORMATS:
        raise ConfigurationError(
            f"{config.file}: format {form!r:.40} of compressed-tensors is not supported: {', '.join(_FORMATS)}"
        )


def _read_args(config: JsonConfig, group: str) -> WeightArgs:
    bits, kind = config.integer("num_bits", 8), config.string("type", "int")
    if bits not in _BITS.get(kind, ()):
        raise ConfigurationError(
            f"{config.file}: weights of {bits} bits ({kind}) in {group} are not supported: int 4, int 8, float 8"
        )
    strategy = config.string("strategy", _implied_strategy(config.values))
    if strategy not in _STRATEGIES:
        raise ConfigurationError(f"{config.file}: {group} has strategy {strategy!r:.40}: {', '.join(_STRATEGIES)}")
    size = config.integer("group_size", -1) if strategy == "group" else -1
    if size != -1 and size < 1:
        raise ConfigurationError(f"{config.file}: group_size must be -1 or positive, got {size}")
    return WeightArgs(bits, size, read_block(config, "block_structure") if strategy == "block" else None)


def _implied_strategy(values: Mapping[str, Any]) -> str:
    if values.get("block_structure"):
        return "block"
    return "group" if values.get("group_size") else "tensor"
