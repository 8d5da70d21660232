"""Rotary angles from a checkpoint's settings, in today's spelling (`rope_parameters`) and the older one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig

_DEFAULT_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class RotaryAngles:
    """inverse_frequencies: [head_dim // 2] float32."""

    inverse_frequencies: Tensor

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [num_tokens] -> (cos, signed sin), both [num_tokens, 1, head_dim], as the rotary op wants them."""
        angles = positions[:, None].float() * self.inverse_frequencies  # [num_tokens, head_dim // 2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def read_rotary_angles(config: JsonConfig, head_dim: int, max_positions: int) -> RotaryAngles:
    """Angles by `rope_parameters`, or `rope_theta` and `rope_scaling`. Raises ConfigurationError on unknown types."""
    values = config.mapping("rope_scaling") or config.mapping("rope_parameters")
    if any(isinstance(value, dict) for value in values.values()):
        raise ConfigurationError(f"{config.file}: rope parameters per layer type are not supported")
    settings = JsonConfig(values, file=f"{config.file}: rope_parameters")
    kind = settings.string("rope_type", settings.string("type", "default"))
    theta = settings.number("rope_theta", config.number("rope_theta", _DEFAULT_THETA))
    partial = settings.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ConfigurationError(f"{config.file}: partial_rotary_factor {partial} is not supported, only 1.0")
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    match kind:
        case "default":
            return RotaryAngles(frequencies)
        case "linear":
            return RotaryAngles(frequencies / settings.number("factor"))
        case "llama3":
            return RotaryAngles(_llama3(frequencies, settings, max_positions))
        case _:
            raise ConfigurationError(f"{config.file}: rope type {kind!r} is not supported: default, linear, llama3")


def _llama3(frequencies: Tensor, settings: JsonConfig, max_positions: int) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated (the Llama 3.1 rule)."""
    factor, low, high = (settings.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = settings.integer("original_max_position_embeddings", max_positions)
    wavelengths = 2 * math.pi / frequencies
    share = (original / wavelengths - low) / (high - low)
    between = (1 - share) * frequencies / factor + share * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, between)
    return torch.where(wavelengths < original / high, frequencies, scaled)
