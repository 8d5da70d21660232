"""From the files of a model to its tensors; safetensors only.

Every failure is a ConfigurationError of one line that names the file and what is wrong with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from trivium.errors import ConfigurationError
from trivium.executor.linear import Linear

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_READABLE_DTYPES = ("F64", "F32", "F16", "BF16")
HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


class Checkpoint:
    """The tensors of a model directory, read one by one as float32. A context manager: it holds the files open.

    `loaded_bytes` counts what was read and kept, in float32.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.loaded_bytes = 0
        self._files = _tensor_files(directory)  # tensor name -> file name
        self._handles: dict[str, Any] = {}  # file name -> open safetensors file
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:
        for file in sorted(set(self._files.values())):
            self._handles[file] = self._open(file)
        self._progress = self._stack.enter_context(
            tqdm(total=len(self._files), desc="weights", unit="tensor", disable=None, file=sys.stderr, leave=False)
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def first_of(self, names: Sequence[str]) -> str:
        """The first of `names` that exists; tied tensors are stored under only one of their names.

        Raises ConfigurationError if there is none.
        """
        for name in names:
            if name in self:
                return name
        raise ConfigurationError(f"{self.directory} has no tensor {names[0]}")

    def tensor(self, name: str, *shape: int) -> Tensor:
        """One tensor as float32. Raises ConfigurationError if it is missing or not of `shape`."""
        target = torch.empty(shape, dtype=torch.float32)
        self._read_into(target, name)
        return target

    def linear(self, names: Sequence[str], out_features: Sequence[int], in_features: int, *, bias: bool) -> Linear:
        """The layers `names`[i], each `out_features`[i] wide, stacked into one. Raises ConfigurationError."""
        weight = torch.empty((sum(out_features), in_features), dtype=torch.float32)
        for name, target in zip(names, torch.split_with_sizes(weight, list(out_features)), strict=True):
            self._read_into(target, f"{name}.weight")
        if not bias:
            return Linear(weight)
        stacked_bias = torch.empty(sum(out_features), dtype=torch.float32)
        for name, target in zip(names, torch.split_with_sizes(stacked_bias, list(out_features)), strict=True):
            self._read_into(target, f"{name}.bias")
        return Linear(weight, stacked_bias)

    def tensor_or(self, name: str, tied: Tensor) -> Tensor:
        """The tensor `name`, of the shape of `tied`, or `tied` itself if nothing else is stored.

        As in transformers, a stored tensor that differs from the one it should be tied to wins over the setting.
        """
        if name not in self:
            return tied
        stored = self.tensor(name, *tied.shape)
        if not torch.equal(stored, tied):
            return stored
        self.loaded_bytes -= stored.nbytes
        return tied

    def output_weight(self, name: str, embedding: Tensor, *, tied: bool) -> Tensor:
        """The output projection [vocab_size, hidden]. Raises ConfigurationError if an untied one is missing."""
        return self.tensor_or(name, embedding) if tied else self.tensor(name, *embedding.shape)

    def _read_into(self, target: Tensor, name: str) -> None:
        if name not in self._files:
            raise ConfigurationError(f"{self.directory} has no tensor {name}")
        file = self._files[name]
        try:
            view = self._handles[file].get_slice(name)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
        except SafetensorError as error:
            raise ConfigurationError(f"{self.directory / file}: cannot read {name}: {error}") from None
        if shape != tuple(target.shape):
            raise ConfigurationError(
                f"{self.directory / file}: tensor {name} has shape {list(shape)}, "
                f"but config.json asks for {list(target.shape)}"
            )
        if dtype not in _READABLE_DTYPES:
            raise ConfigurationError(f"{self.directory / file}: tensor {name} is stored as {dtype}, not as floats")
        target.copy_(self._handles[file].get_tensor(name))
        self.loaded_bytes += target.nbytes
        self._progress.update()

    def _open(self, file: str) -> Any:
        path = self.directory / file
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise ConfigurationError(f"{self.directory} has no {file}") from None
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(f"{path} is not a complete safetensors file: {error}") from None


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> name of the file in `directory` that holds it."""
    if (directory / INDEX_FILE).exists():
        return _read_index(directory / INDEX_FILE)
    path = directory / WEIGHTS_FILE
    if not path.exists():
        others = sorted(file.name for file in directory.glob("*.bin"))
        hint = f" ({others[0]} is a pickle and is never read; convert it to safetensors)" if others else ""
        raise ConfigurationError(f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{hint}")
    try:
        with safe_open(path, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{path} is not a complete safetensors file: {error}") from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, OSError):
        raise ConfigurationError(f"{path} is not a safetensors index") from None
    if not isinstance(weight_map, dict) or any(Path(str(file)).name != file for file in weight_map.values()):
        raise ConfigurationError(f"{path}: weight_map must map tensor names to file names")
    return weight_map
