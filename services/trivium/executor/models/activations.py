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
        "gelu_python": Activation.GELU,
        "gelu_new": Activation.GELU_TANH,
        "gelu_fast": Activation.GELU_TANH,
        "gelu_accurate": Activation.GELU_TANH,
        "gelu_pytorch_tanh": Activation.GELU_TANH,
        "gelu_python_tanh": Activation.GELU_TANH,
        "quick_gelu": Activation.QUICK_GELU,
        "relu2": Activation.RELU2,
        "relu6": Activation.RELU6,
        "leaky_relu": Activation.LEAKY_RELU,
        "hardswish": Activation.HARDSWISH,
        "mish": Activation.MISH,
        "tanh": Activation.TANH,
        "sigmoid": Activation.SIGMOID,
        "linear": Activation.LINEAR,
    }
)


def read_activation(config: JsonConfig, key: str, default: str) -> Activation:
    """The activation that `key` names. Raises ConfigurationError for one that we do not have."""
    return activation_by_name(config.string(key, default), config.file, key)


def activation_by_name(name: str, file: str, key: str) -> Activation:
    if name not in _BY_NAME:
        raise ConfigurationError(f"{file}: {key} {name!r} is not supported: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
