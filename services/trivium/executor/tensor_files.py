"""Files that hold named tensors: safetensors, and those that torch.save wrote (`pytorch_model.bin`).

The latter are pickles. They are read by torch's restricted unpickler, which builds tensors and nothing else, and only
as part of the model that the operator named; nothing that a client sends comes here.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trivium.errors import ConfigurationError

_SAFE_DTYPES = ("F64", "F32", "F16", "BF16")
_TORCH_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorFile(Protocol):
    """An open file."""

    def names(self) -> Iterable[str]: ...

    def describe(self, name: str) -> tuple[tuple[int, ...], str | None]:
        """(shape, its type if that is not a floating-point one that can be read). Raises ConfigurationError."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored. Valid as long as the file object lives."""
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
    """Mapped into memory where it is a zip archive, as torch writes since 1.6; older ones are read whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigurationError(f"{path} is not a file of tensors that can be read safely: {reason}") from None
        if not isinstance(stored, Mapping):
            raise ConfigurationError(f"{path} must hold named tensors, got {type(stored).__name__}")
        self._tensors = {name: value for name, value in stored.items() if isinstance(value, Tensor)}

    def names(self) -> Iterable[str]:
        return list(self._tensors)

    def describe(self, name: str) -> tuple[tuple[int, ...], str | None]:
        if name not in self._tensors:
            raise ConfigurationError(f"{self._path}: cannot read {name}: the file does not hold it")
        tensor = self._tensors[name]
        return tuple(tensor.shape), None if tensor.dtype in _TORCH_DTYPES else str(tensor.dtype).removeprefix("torch.")

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def open_tensor_file(path: Path) -> TensorFile:
    """By its name. Raises ConfigurationError if it is missing, broken, or holds more than tensors."""
    if not path.exists():
        raise ConfigurationError(f"{path.parent} has no {path.name}")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
