"""GPTQ: integers packed along the inputs, scales and zero points per group of inputs (https://arxiv.org/abs/2210.17323).

`qweight` int32 [in / per_word, out], `qzeros` int32 [groups, out / per_word], `scales` [groups, out], `g_idx` [in]: the
group of each input, which is not its place where the layer was quantized in order of activation (`desc_act`).
The first version of the format stores a zero point less one, modulo 2 ** bits; `gptq_v2` stores it as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.quantization.grouped_weight import GroupedWeight, grouped_weight
from trivium.executor.quantization.scheme import PACKABLE_BITS, WORD_BITS, StoredTensors, group_index, unpack

_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True)
class GptqLayers:
    """bits and group_size of most layers; `dynamic` [(pattern of names, other settings)] of the others."""

    bits: int
    group_size: int
    zero_offset: int
    dynamic: tuple[tuple[re.Pattern[str], Mapping[str, Any]], ...] = ()

    def is_packed(self, layer: str, tensors: StoredTensors) -> bool:
        return f"{layer}.qweight" in tensors

    def weight(self, layer: str, in_features: int, tensors: StoredTensors) -> GroupedWeight:
        bits, group_size = self._settings(layer)
        values = unpack(tensors.stored(f"{layer}.qweight").T, bits)  # [out, in filled up to whole words]
        per_word = WORD_BITS // bits
        if values.shape[1] != -(-in_features // per_word) * per_word:
            raise ConfigurationError(
                f"{layer}: {values.shape[1]} packed inputs of {bits} bits, but config.json asks for {in_features}"
            )
        values = values[:, :in_features]
        zeros = (unpack(tensors.stored(f"{layer}.qzeros"), bits).T.int() + self.zero_offset) % (1 << bits)
        groups = group_index(in_features, group_size)
        if f"{layer}.g_idx" in tensors:
            stored = tensors.stored(f"{layer}.g_idx")
            groups = stored.long() if stored.numel() else groups
        scales = tensors.stored(f"{layer}.scales").T
        return grouped_weight(layer, values, zeros[: len(values)], scales, groups, bits=bits)

    def _settings(self, layer: str) -> tuple[int, int]:
        for pattern, other in self.dynamic:
            if pattern.match(layer):
                settings = JsonConfig({"bits": self.bits, "group_size": self.group_size, **other})
                return _bits(settings), _group_size(settings)
        return self.bits, self.group_size


def read_gptq(config: JsonConfig) -> GptqLayers:
    """Raises ConfigurationError for a variant that is not supported."""
    form = config.string("checkpoint_format", "gptq")
    if form not in _ZERO_OFFSETS:
        raise ConfigurationError(
            f"{config.file}: checkpoint_format {form!r:.40} of GPTQ is not supported: {', '.join(_ZERO_OFFSETS)}"
        )
    dynamic = []
    for key, other in config.mapping("dynamic").items():
        if not key.startswith("-:"):  # of those the weights are stored as floats
            dynamic.append((_pattern(config, key.removeprefix("+:")), other))
    return GptqLayers(_bits(config), _group_size(config), _ZERO_OFFSETS[form], tuple(dynamic))


def _bits(config: JsonConfig) -> int:
    bits = config.integer("bits")
    if bits not in PACKABLE_BITS:
        raise ConfigurationError(f"{config.file}: GPTQ with {bits} bits is not supported: {PACKABLE_BITS}")
    return bits


def _group_size(config: JsonConfig) -> int:
    size = config.integer("group_size", 128)
    if size != -1 and size < 1:
        raise ConfigurationError(f"{config.file}: group_size must be -1 or positive, got {size}")
    return size


def _pattern(config: JsonConfig, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigurationError(f"{config.file}: {text!r:.60} is not a regular expression: {error}") from None
