"""Where a model runs, in which type and with which operators: decided once, at load, and an argument from there on."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from trivium.config import ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor.decode_graphs import CudaGraphRecorder, GraphRecorder
from trivium.executor.model_config import JsonConfig
from trivium.executor.parallel.communicator import rank_device
from trivium_kernels.dispatch import Kernels, select_kernels

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
DEVICES = ("auto", "cpu", "cuda")
_TYPES = {
    "float": torch.float32,
    "float32": torch.float32,
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Platform:
    """device: where weights, KV pool and every tensor of a step are. dtype: of weights, activations, keys and values.

    is_gpu: steps are queued before the results of earlier ones have come, and linear layers multiply as on a GPU. It
    says nothing about `device`: what runs on a GPU can be tested on a CPU, with the operators of a GPU.
    recorder: of its decode steps; None runs every step operator by operator.
    """

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels
    is_gpu: bool
    recorder: GraphRecorder | None = None


def choose_platform(config: ExecutorConfig, model_json: JsonConfig, rank: int) -> Platform:
    """By the settings and the type that config.json names. Raises ConfigurationError."""
    device = rank_device(choose_device(config.device), rank)
    is_gpu = device.type == "cuda"
    dtype = _gpu_dtype(config.dtype, model_json) if is_gpu else _cpu_dtype(config.dtype)
    try:
        kernels = select_kernels(device)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    if is_gpu:
        torch.cuda.set_device(device)  # kernels run on the current one
    recorder = None if config.enforce_eager else _choose_recorder(is_gpu)
    return Platform(device, dtype, kernels, is_gpu, recorder)


def _choose_recorder(is_gpu: bool) -> GraphRecorder | None:
    """Of a CPU there is one where the kernels in C++ are."""
    if is_gpu:
        return CudaGraphRecorder()
    try:
        from trivium_kernels.cpu import NativeRecorder
    except ImportError:
        return None
    return NativeRecorder()


def choose_device(device: str) -> torch.device:
    """Raises ConfigurationError for what is unknown or not there."""
    if device not in DEVICES:
        raise ConfigurationError(f"device {device!r} is not supported: {', '.join(DEVICES)}")
    is_there = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not is_there:
        raise ConfigurationError("device 'cuda': torch finds no GPU here (torch.cuda.is_available() is False)")
    return torch.device("cuda") if is_there else CPU


def _cpu_dtype(name: str) -> torch.dtype:
    """float32: with bfloat16 only products are rounded (`layer_products`)."""
    _check_dtype(name)
    if _TYPES.get(name) is torch.float16:
        logger.warning("dtype adjusted from %s to float32: half-precision arithmetic is far slower on a CPU", name)
    return torch.float32


def _gpu_dtype(name: str, model_json: JsonConfig) -> torch.dtype:
    """The checkpoint's own with "auto": of those that write none down, most are float32."""
    _check_dtype(name)
    if name != "auto":
        return _TYPES[name]
    own = model_json.values.get("dtype") or model_json.values.get("torch_dtype")
    return _TYPES.get(str(own), torch.float32)


def _check_dtype(name: str) -> None:
    if name != "auto" and name not in _TYPES:
        raise ConfigurationError(f"dtype {name!r} is not supported: auto, {', '.join(_TYPES)}")
