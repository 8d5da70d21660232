"""The names that checkpoints give to activations."""

from __future__ import annotations

from types import MappingProxyType

from trivium.errors import ConfigurationError
from trivium.executor.model_config import JsonConfig
from trivium_kernels.activation import Activation

_BY_NAME = MappingProxyType(
    {
        "relu": Activation.RELU,
        "silu": Activation.SILU,
        "swish": Activation.SILU,
        "gelu": Activation.GELU,
        "gelu_new": Activation.GELU_TANH,
        "gelu_pytorch_tanh": Activation.GELU_TANH,
    }
)


def read_activation(config: JsonConfig, key: str, default: str) -> Activation:
    """The activation that `key` names. Raises ConfigurationError for one that we do not have."""
    return activation_by_name(config.string(key, default), config.file, key)


def activation_by_name(name: str, file: str, key: str) -> Activation:
    if name not in _BY_NAME:
        raise ConfigurationError(f"{file}: {key} {name!r} is not supported: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
