"""From the files of a model to its tensors: safetensors, or `pytorch_model.bin` where there are none.

Packed weights become floats here.

Every failure is a ConfigurationError of one line that names the file and what is wrong with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from trivium.config import ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor.adapter_pool import AdapterPool
from trivium.executor.linear import Linear
from trivium.executor.quantization.scheme import Quantization
from trivium.executor.tensor_files import TensorFile, open_tensor_file
from trivium.model_source import find_model

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# In order of preference: (index of several files, one file).
_KINDS = ((INDEX_FILE, WEIGHTS_FILE), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
_HALF_DTYPES = (torch.float16, torch.bfloat16)
HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_BIN_PATTERNS = (*HUB_PATTERNS, "pytorch_model*.bin")


def find_checkpoint(config: ExecutorConfig) -> Path:
    """The directory with the model's files; of a hub model `.bin` files are fetched only if it has no safetensors.

    Raises ConfigurationError.
    """
    directory = find_model(config.model, config.revision, patterns=HUB_PATTERNS)
    if any((directory / file).exists() for file in _KINDS[0]):
        return directory
    return find_model(config.model, config.revision, patterns=_BIN_PATTERNS)


class Checkpoint:
    """The tensors of a model directory, read one by one as float32. A context manager: it holds the files open.

    `loaded_bytes` counts what was read and kept, in float32. quantization: how it stores what it has packed. A packed
    weight is `LAYER.weight` here as any other. adapters: of the linear layers to come; None if there can be none.
    `stores_half`: every matrix read so far was stored in 16 bits.
    """

    def __init__(
        self, directory: Path, quantization: Quantization | None = None, adapters: AdapterPool | None = None
    ) -> None:
        self.directory = directory
        self._quantization = quantization
        self._adapters = adapters
        self.loaded_bytes = 0
        self.stores_half = True
        self._tensors = {name: (file, name) for name, file in _tensor_files(directory).items()}  # (file, stored name)
        self._handles: dict[str, TensorFile] = {}  # file name -> open file
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:
        for file in sorted({file for file, _ in self._tensors.values()}):
            self._handles[file] = open_tensor_file(self.directory / file)
        self._progress = self._stack.enter_context(
            tqdm(total=len(self._tensors), desc="weights", unit="tensor", disable=None, file=sys.stderr, leave=False)
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._handles.clear()
        self._stack.close()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or self._packed_layer(str(name)) is not None

    def add_missing_prefix(self, prefix: str) -> None:
        """Find tensors as `prefix`.NAME too, if none is stored so: checkpoints of a model without its output layer."""
        if not any(name.startswith(f"{prefix}.") for name in self._tensors):
            self._tensors |= {f"{prefix}.{name}": place for name, place in self._tensors.items()}

    def stored(self, name: str) -> Tensor:
        """One tensor as it is stored. Raises ConfigurationError if it is missing or cannot be read."""
        if name not in self._tensors:
            raise ConfigurationError(f"{self.directory} has no tensor {name}")
        file, stored_name = self._tensors[name]
        self._progress.update()
        return self._handles[file].read(stored_name)

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

    def linear(
        self,
        names: Sequence[str],
        out_features: Sequence[int],
        in_features: int,
        *,
        bias: bool,
        transposed: bool = False,
        adaptable: bool = True,
    ) -> Linear:
        """The layers `names`[i], each `out_features`[i] wide, stacked into one. Raises ConfigurationError.

        transposed: their weights are stored as [in_features, out_features]. adaptable: adapters may change them.
        """
        weight = torch.empty((sum(out_features), in_features), dtype=torch.float32)
        for name, target in zip(names, torch.split_with_sizes(weight, list(out_features)), strict=True):
            is_packed = self._packed_layer(f"{name}.weight") is not None  # and then [out_features, in_features]
            self._read_into(target.T if transposed and not is_packed else target, f"{name}.weight")
        delta = None
        if self._adapters is not None and adaptable:
            delta = self._adapters.add_layer(names, out_features, in_features)
        if not bias:
            return Linear(weight, delta=delta)
        stacked_bias = torch.empty(sum(out_features), dtype=torch.float32)
        for name, target in zip(names, torch.split_with_sizes(stacked_bias, list(out_features)), strict=True):
            self._read_into(target, f"{name}.bias")
        return Linear(weight, stacked_bias, delta)

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

    def _packed_layer(self, name: str) -> str | None:
        """The layer whose weight `name` is, if it is stored packed."""
        layer, _, kind = name.rpartition(".")
        if self._quantization is None or kind != "weight" or not self._quantization.is_packed(layer, self):
            return None
        return layer

    def _unpack_into(self, target: Tensor, layer: str) -> None:
        assert self._quantization is not None, "only a quantized checkpoint has packed layers"
        weight = self._quantization.weight(layer, target.shape[-1], self)
        if weight.shape != target.shape:
            raise ConfigurationError(
                f"{self.directory}: the packed weight of {layer} has shape {list(weight.shape)}, "
                f"but config.json asks for {list(target.shape)}"
            )
        target.copy_(weight)
        self.loaded_bytes += target.nbytes
        self.stores_half = False

    def _read_into(self, target: Tensor, name: str) -> None:
        layer = self._packed_layer(name)
        if layer is not None:
            return self._unpack_into(target, layer)
        if name not in self._tensors:
            raise ConfigurationError(f"{self.directory} has no tensor {name}")
        file, stored_name = self._tensors[name]
        shape, unreadable = self._handles[file].describe(stored_name)
        if shape != tuple(target.shape):
            raise ConfigurationError(
                f"{self.directory / file}: tensor {stored_name} has shape {list(shape)}, "
                f"but config.json asks for {list(target.shape)}"
            )
        if unreadable is not None:
            raise ConfigurationError(
                f"{self.directory / file}: tensor {stored_name} is stored as {unreadable}, not as floats"
            )
        stored = self._handles[file].read(stored_name)
        target.copy_(stored)
        self.loaded_bytes += target.nbytes
        self.stores_half &= stored.dtype in _HALF_DTYPES or len(shape) < 2
        self._progress.update()


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> name of the file in `directory` that holds it."""
    for index, weights in _KINDS:
        if (directory / index).exists():
            return _read_index(directory / index)
        if (directory / weights).exists():
            return dict.fromkeys(open_tensor_file(directory / weights).names(), weights)
    raise ConfigurationError(
        f"{directory} has neither {' nor '.join(file for kind in _KINDS for file in reversed(kind))}"
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, OSError):
        raise ConfigurationError(f"{path} is not an index of tensors") from None
    if not isinstance(weight_map, dict) or any(Path(str(file)).name != file for file in weight_map.values()):
        raise ConfigurationError(f"{path}: weight_map must map tensor names to file names")
    return weight_map
