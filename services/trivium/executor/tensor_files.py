"""Files that hold named tensors: safetensors, and those that torch.save wrote (`pytorch_model.bin`).

The latter are read by `torch_format.py`, which builds tensors and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trivium.errors import ConfigurationError
from trivium.torch_format import TensorFormatError, open_torch_checkpoint

_SAFE_DTYPES = ("F64", "F32", "F16", "BF16")
_FLOATS = ("float64", "float32", "float16", "bfloat16")  # of torch.save


class TensorFile(Protocol):
    """An open file."""

    def names(self) -> Iterable[str]: ...

    def describe(self, name: str) -> tuple[tuple[int, ...], str | None]:
        """(shape, its type if that is not a floating-point one that can be read). Raises ConfigurationError."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored, floats maybe as float32. Valid as long as the file object lives."""
        ...


class SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._handle: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(f"{path} is not a complete safetensors file: {error}") from None

    def names(self) -> Iterable[str]:
        return list(self._handle.keys())

    def describe(self, name: str) -> tuple[tuple[int, ...], str | None]:
        try:
            view = self._handle.get_slice(name)
        except SafetensorError as error:
            raise ConfigurationError(f"{self._path}: cannot read {name}: {error}") from None
        dtype = view.get_dtype()
        return tuple(view.get_shape()), None if dtype in _SAFE_DTYPES else str(dtype)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor


class TorchFile:
    """A zip archive of torch.save, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._tensors = open_torch_checkpoint(path)
        except (TensorFormatError, OSError) as error:
            raise ConfigurationError(f"{path} is not a file of tensors that can be read safely: {error}") from None

    def names(self) -> Iterable[str]:
        return list(self._tensors)

    def describe(self, name: str) -> tuple[tuple[int, ...], str | None]:
        if name not in self._tensors:
            raise ConfigurationError(f"{self._path}: cannot read {name}: the file does not hold it")
        tensor = self._tensors[name]
        return tensor.values.shape, None if tensor.dtype in _FLOATS else tensor.dtype

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        numbers = tensor.to_float32() if tensor.dtype in _FLOATS else tensor.values
        return torch.from_numpy(np.array(numbers))  # a copy: torch wants to write


def open_tensor_file(path: Path) -> TensorFile:
    """By its name. Raises ConfigurationError if it is missing, broken, or holds more than tensors."""
    if not path.exists():
        raise ConfigurationError(f"{path.parent} has no {path.name}")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
