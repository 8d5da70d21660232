"""Rotary angles from a checkpoint's settings, in today's spelling (`rope_parameters`) and the older one.

Scalings as in transformers (`modeling_rope_utils`), with one difference: where it takes frequencies from the longest
sequence of a batch, ours never depend on what else runs, or cached keys would not fit later queries. A token that
`dynamic` lengthens has those of a sequence that ends with it; `longrope` takes its long factors when the context that
is served is longer than the original one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig

_ORIGINAL = "original_max_position_embeddings"
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeDefaults:
    """What a family's class in transformers says of keys that its config.json may leave out, and how it names them.

    partial: share of a head that is rotated; None where the family always rotates whole heads. aliases: rope types that
    are another one here.
    """

    theta_key: str = "rope_theta"
    theta: float = 10000.0
    partial_key: str = "partial_rotary_factor"
    partial: float | None = None
    original_positions: int | None = None
    aliases: Mapping[str, str] = field(default_factory=lambda: {"su": "longrope"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryConfig:
    """frequencies: [rotary_dim // 2]. long_frequencies: of longrope, for contexts over `original_positions`.

    growth: (theta, factor) of `dynamic`, for tokens past `original_positions`. attention_factor multiplies queries and
    keys. max_positions: the longest context that these settings are made for.
    """

    frequencies: tuple[float, ...]
    original_positions: int
    max_positions: int
    attention_factor: float = 1.0
    long_frequencies: tuple[float, ...] | None = None
    growth: tuple[float, float] | None = None


class RotaryAngles:
    """Immutable after construction."""

    def __init__(self, config: RotaryConfig, device: torch.device | None = None) -> None:
        self._config = config
        self._frequencies = torch.tensor(config.frequencies, device=device)  # [rotary_dim // 2]
        self._long_frequencies: Tensor | None = None
        if config.long_frequencies:
            self._long_frequencies = torch.tensor(config.long_frequencies, device=device)
        rotary_dim = 2 * len(config.frequencies)
        self._exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim

    def cos_sin(self, positions: Tensor, max_model_len: int) -> tuple[Tensor, Tensor]:
        """positions [num_tokens] -> (cos, signed sin), both [num_tokens, 1, rotary_dim], as the rotary op wants them.

        max_model_len: the longest context that is served.
        """
        angles = positions[:, None].float() * self._frequencies_at(positions, max_model_len)
        cos, sin = angles.cos(), angles.sin()  # [num_tokens, rotary_dim // 2]
        if self._config.attention_factor != 1.0:
            cos, sin = cos * self._config.attention_factor, sin * self._config.attention_factor
        return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)

    def _frequencies_at(self, positions: Tensor, max_model_len: int) -> Tensor:
        """[rotary_dim // 2], or [num_tokens, rotary_dim // 2] where tokens differ."""
        config = self._config
        if self._long_frequencies is not None and max_model_len > config.original_positions:
            return self._long_frequencies
        if config.growth is None:
            return self._frequencies
        # Shorter sequences have the same from the formula; a GPU is not asked, which would take longer.
        if positions.device.type == "cpu" and not bool((positions >= config.original_positions).any()):
            return self._frequencies
        theta, factor = config.growth
        rotary_dim = 2 * len(self._frequencies)
        lengths = (positions + 1).clamp(min=config.original_positions)
        stretch = factor * lengths / config.original_positions - (factor - 1)
        bases = theta * stretch ** (rotary_dim / (rotary_dim - 2))
        return 1.0 / bases[:, None] ** self._exponents


def read_rotary(
    config: JsonConfig,
    head_dim: int,
    max_positions: int,
    defaults: RopeDefaults,
    parameters: Mapping[str, Any] | None = None,
) -> RotaryConfig:
    """By `parameters`, or the config's `rope_parameters`, or its `rope_theta` and `rope_scaling`.

    Raises ConfigurationError, naming the key, for what is unknown or cannot be.
    """
    if parameters is None:
        parameters = config.mapping("rope_scaling") or config.mapping("rope_parameters")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigurationError(
            f"{config.file}: rope parameters per layer type are not supported by this architecture"
        )
    settings = JsonConfig(parameters, file=f"{config.file}: rope_parameters")
    kind = settings.string("rope_type", settings.string("type", "default"))
    kind = defaults.aliases.get(kind, kind)
    theta = settings.number("rope_theta", config.number(defaults.theta_key, defaults.theta))
    rotary_dim = _rotary_dim(config, settings, head_dim, defaults)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    original = settings.positive_integer(_ORIGINAL, max_positions)
    original = config.positive_integer(_ORIGINAL, defaults.original_positions or original)
    plain = 1.0 / theta**exponents
    match kind:
        case "default":
            return _config(plain, max_positions, max_positions)
        case "linear":
            return _config(plain / settings.number("factor"), max_positions, max_positions)
        case "llama3":
            return _config(_llama3(plain, settings, original), original, max_positions)
        case "dynamic":
            factor = settings.number("factor")
            if rotary_dim <= 2:
                raise ConfigurationError(
                    f"{settings.file}: rope type 'dynamic' needs more than {rotary_dim} dimensions"
                )
            return _config(plain, max_positions, int(max_positions * factor), growth=(theta, factor))
        case "yarn":
            return _yarn(plain, theta, settings, original, max_positions)
        case "longrope":
            return _longrope(theta**exponents, settings, original, max_positions)
        case _:
            raise ConfigurationError(f"{config.file}: rope type {kind!r} is not supported: {', '.join(_ROPE_TYPES)}")


def _rotary_dim(config: JsonConfig, settings: JsonConfig, head_dim: int, defaults: RopeDefaults) -> int:
    whole = 1.0 if defaults.partial is None else defaults.partial
    partial = settings.number("partial_rotary_factor", config.number(defaults.partial_key, whole))
    if defaults.partial is None and partial != 1.0:
        raise ConfigurationError(f"{config.file}: {defaults.partial_key} {partial} is not supported, only 1.0")
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ConfigurationError(
            f"{config.file}: {defaults.partial_key} {partial} of head size {head_dim} cannot be rotated in pairs"
        )
    return rotary_dim


def _config(frequencies: Tensor, original: int, max_positions: int, **fields: Any) -> RotaryConfig:
    return RotaryConfig(
        frequencies=tuple(frequencies.tolist()), original_positions=original, max_positions=max_positions, **fields
    )


def _llama3(frequencies: Tensor, settings: JsonConfig, original: int) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated (the Llama 3.1 rule)."""
    factor, low, high = (settings.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelengths = 2 * math.pi / frequencies
    share = (original / wavelengths - low) / (high - low)
    between = (1 - share) * frequencies / factor + share * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, between)
    return torch.where(wavelengths < original / high, frequencies, scaled)


def _yarn(frequencies: Tensor, theta: float, settings: JsonConfig, original: int, max_positions: int) -> RotaryConfig:
    """Frequencies that turn more than `beta_fast` times over the original context are kept, those that turn less than
    `beta_slow` times are divided by `factor`, with a linear ramp between. https://arxiv.org/abs/2309.00071, 3.2 to 3.4.
    """
    factor = settings.number("factor", max_positions / original)
    rotary_dim = 2 * len(frequencies)

    def dimension_of(num_turns: float) -> float:
        return rotary_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    first = dimension_of(settings.number("beta_fast", 32) or 32)
    last = dimension_of(settings.number("beta_slow", 1) or 1)
    if settings.boolean("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first if last != first else 0.001
    interpolated = ((torch.arange(len(frequencies), dtype=torch.float32) - first) / width).clamp(0, 1)
    frequencies = frequencies / factor * interpolated + frequencies * (1 - interpolated)
    attention_factor = settings.number("attention_factor", _yarn_attention_factor(factor, settings))
    longest = max(max_positions, int(original * factor))
    return _config(frequencies, original, longest, attention_factor=attention_factor)


def _yarn_attention_factor(factor: float, settings: JsonConfig) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scale, scale_all = settings.number("mscale", 0.0), settings.number("mscale_all_dim", 0.0)
    return magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)


def _longrope(wavelengths: Tensor, settings: JsonConfig, original: int, max_positions: int) -> RotaryConfig:
    """https://arxiv.org/abs/2402.13753. wavelengths: [rotary_dim // 2], of the unscaled angles, over 2 pi."""
    short, long = (_factors(settings, key, len(wavelengths)) for key in ("short_factor", "long_factor"))
    factor = settings.number("factor", max_positions / original)
    attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return _config(
        1.0 / (short * wavelengths),
        original,
        max_positions,
        long_frequencies=tuple((1.0 / (long * wavelengths)).tolist()),
        attention_factor=settings.number("attention_factor", attention_factor),
    )


def _factors(settings: JsonConfig, key: str, length: int) -> Tensor:
    factors = settings.values.get(key)
    if not isinstance(factors, list) or len(factors) != length or not all(_is_number(factor) for factor in factors):
        raise ConfigurationError(f"{settings.file}: {key} must be a list of {length} numbers, got {factors!r:.60}")
    return torch.tensor(factors, dtype=torch.float32)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
