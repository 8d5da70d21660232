"""FP8: 8-bit floats with a scale per tensor, per output or per block of the weight.

`weight` float8 [out, in] with `weight_scale` (one, [out] or [out, 1]) or, per block, `weight_scale_inv`: in spite of
its name a factor too, [out / rows, in / columns] rounded up. Scales of activations are not used: weights become floats,
and activations stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium.executor.quantization.grouped_weight import GroupedWeight, scaled_weight
from trivium.executor.quantization.scheme import StoredTensors

_SCALES = ("weight_scale_inv", "weight_scale")


@dataclass(frozen=True, slots=True)
class Fp8Layers:
    """block: rows and columns that share a scale, if the weights are scaled by blocks."""

    block: tuple[int, int] | None

    def is_packed(self, layer: str, tensors: StoredTensors) -> bool:
        return any(f"{layer}.{scale}" in tensors for scale in _SCALES)

    def weight(self, layer: str, in_features: int, tensors: StoredTensors) -> GroupedWeight:
        name = next(name for name in _SCALES if f"{layer}.{name}" in tensors)
        return scaled_weight(layer, tensors.stored(f"{layer}.weight"), tensors.stored(f"{layer}.{name}"), self.block)


def read_fp8(config: JsonConfig) -> Fp8Layers:
    """Raises ConfigurationError for a variant that is not supported."""
    scheme = config.string("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise ConfigurationError(f"{config.file}: activation_scheme {scheme!r:.40} of FP8 is not supported")
    return Fp8Layers(read_block(config, "weight_block_size"))


def read_block(config: JsonConfig, key: str) -> tuple[int, int] | None:
    """(rows, columns) of a block, None if the key is absent or null."""
    block = config.values.get(key)
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or any(not isinstance(size, int) or size < 1 for size in block):
        raise ConfigurationError(f"{config.file}: {key} must be two sizes, got {block!r:.40}")
    return block[0], block[1]
