"""AWQ: 4-bit integers packed along the outputs, interleaved (https://arxiv.org/abs/2306.00978, the "gemm" layout).

`qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out]. The values of a word belong to
its outputs 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first.
"""

from __future__ import annotations

from dataclasses import dataclass

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.quantization.grouped_weight import GroupedWeight, grouped_weight
from trivium.executor.quantization.scheme import StoredTensors, group_index, unpack

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of outputs 0 to 7 in a word


@dataclass(frozen=True, slots=True)
class AwqLayers:
    group_size: int

    def is_packed(self, layer: str, tensors: StoredTensors) -> bool:
        return f"{layer}.qweight" in tensors

    def weight(self, layer: str, in_features: int, tensors: StoredTensors) -> GroupedWeight:
        values = unpack(tensors.stored(f"{layer}.qweight"), _BITS, _PLACES).T  # [out, in]
        if values.shape[1] != in_features:
            raise ConfigurationError(
                f"{layer}: {values.shape[1]} packed inputs, but config.json asks for {in_features}"
            )
        zeros = unpack(tensors.stored(f"{layer}.qzeros"), _BITS, _PLACES).T
        scales = tensors.stored(f"{layer}.scales").T
        return grouped_weight(layer, values, zeros, scales, group_index(in_features, self.group_size), bits=_BITS)


def read_awq(config: JsonConfig) -> AwqLayers:
    """Raises ConfigurationError for a variant that is not supported."""
    bits = config.integer("bits", config.integer("w_bit", _BITS))
    if bits != _BITS:
        raise ConfigurationError(f"{config.file}: AWQ with {bits} bits is not supported, only with {_BITS}")
    layout = config.string("version", "gemm").lower()
    if layout != "gemm":
        raise ConfigurationError(f"{config.file}: version {layout!r:.40} of AWQ is not supported, only 'gemm'")
    size = config.integer("group_size", config.integer("q_group_size", 128))
    if size != -1 and size < 1:
        raise ConfigurationError(f"{config.file}: group_size must be -1 or positive, got {size}")
    return AwqLayers(size)
