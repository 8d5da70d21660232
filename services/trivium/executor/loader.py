"""From the files of a model to its tensors: safetensors, or `pytorch_model.bin` where there are none.

Packed weights become floats here, but for those of layers that a WeightPacker keeps packed.

Every failure is a ConfigurationError of one line that names the file and what is wrong with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from trivium.config import ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor.adapter_pool import AdapterPool
from trivium.executor.linear import Delta, Linear
from trivium.executor.parallel.shard import Shard, Split
from trivium.executor.quantization.grouped_weight import GroupedWeight
from trivium.executor.quantization.scheme import Quantization
from trivium.executor.tensor_files import TensorFile, open_tensor_file
from trivium.executor.weight_packer import StoredPart, WeightPacker
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
    """The tensors of a model directory, read one by one as `dtype`. A context manager: it holds the files open.

    `loaded_bytes` counts what was read and kept. quantization: how it stores what it has packed. A packed
    weight is `LAYER.weight` here as any other. packer: what keeps packed weights of linear layers as they are, None if
    they are to be floats. adapters: of the linear layers to come; None if there can be none.
    `stores_half`: every matrix read so far was stored in 16 bits. shard: the part of the model that is wanted; of what
    is split, only that part is kept. `whole_layers`: those that every rank of a split model has and computes. device,
    dtype: of all tensors that come from here.
    """

    def __init__(
        self,
        directory: Path,
        quantization: Quantization | None = None,
        adapters: AdapterPool | None = None,
        shard: Shard | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        packer: WeightPacker | None = None,
    ) -> None:
        self.directory = directory
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self.shard = shard or Shard()
        self.whole_layers: list[Linear] = []
        self._quantization = quantization
        self._packer = packer
        self.adapters = adapters
        self.loaded_bytes = 0
        self.stores_half = True
        self._tensors = {name: (file, name) for name, file in _tensor_files(directory).items()}  # (file, stored name)
        self._handles: dict[str, TensorFile] = {}  # file name -> open file
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:
        for file in sorted({file for file, _ in self._tensors.values()}):
            self._handles[file] = open_tensor_file(self.directory / file)
        self._progress = self._stack.enter_context(
            tqdm(
                total=len(self._tensors),
                desc="weights",
                unit="tensor",
                disable=self.shard.rank > 0 or None,
                file=sys.stderr,
                leave=False,
            )
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
        """One tensor. Raises ConfigurationError if it is missing or not of `shape`."""
        target = self._empty(*shape)
        self._fill(target, [self._read(name, shape)], [(slice(None),)])
        return target

    def rows(self, name: str, rows: range, *shape: int) -> Tensor:
        """As `tensor`, but of the tensor of `shape` only these rows, as far as it has them."""
        kept = _existing(rows, shape[0])
        target = self._empty(kept.stop - kept.start, *shape[1:])
        self._fill(target, [self._read(name, shape)], [(kept,)])
        return target

    def linear(
        self,
        names: Sequence[str],
        out_features: Sequence[int],
        in_features: int,
        *,
        bias: bool,
        transposed: bool = False,
        split: Split | None = None,
    ) -> Linear:
        """The layers `names`[i], each `out_features`[i] wide, stacked into one. Raises ConfigurationError.

        transposed: their weights are stored as [in_features, out_features]. split: what of them is wanted, None for
        all. Of several ranks that each have some inputs, the first one adds the bias.
        """
        part = split or Split()
        rows = part.rows or [(slice(0, width),) for width in out_features]
        columns = part.columns or slice(0, in_features)
        num_rows = sum(each.stop - each.start for ranges in rows for each in ranges)
        stacked_bias = None
        if bias and not (part.columns and self.shard.rank):
            stacked_bias = self._empty(num_rows)
            biases = (self._read(f"{name}.bias", (width,)) for name, width in zip(names, out_features, strict=True))
            self._fill(stacked_bias, biases, rows)
        delta = None
        if self.adapters is not None:
            delta = self.adapters.add_layer(names, out_features, in_features, split)
        sources = (
            self._source(f"{name}.weight", (width, in_features), transposed=transposed)
            for name, width in zip(names, out_features, strict=True)
        )
        if self._packer is not None and any(self._packed_layer(f"{name}.weight") for name in names):
            parts = (
                StoredPart(name, _part_of(source, ranges, columns))
                for name, source, ranges in zip(names, sources, rows, strict=True)
            )
            linear = self._packed(self._packer, parts, stacked_bias, delta)
        else:
            weight = self._empty(num_rows, columns.stop - columns.start)
            self._fill(weight, (_floats(source)[:, columns] for source in sources), rows)
            linear = Linear(weight, stacked_bias, delta)
        if split is None:
            self.whole_layers.append(linear)
        return linear

    def rows_or(self, name: str, tied: Tensor, rows: range, num_rows: int) -> Tensor:
        """As `rows` of a tensor of `num_rows`, or `tied` itself, which has the same part, if nothing else is stored.

        As in transformers, a stored tensor that differs from the one it should be tied to wins over the setting.
        """
        if name not in self:
            return tied
        stored = self.rows(name, rows, num_rows, tied.shape[1])
        if not torch.equal(stored, tied):
            return stored
        self.loaded_bytes -= stored.nbytes
        return tied

    def output_weight(self, name: str, embedding: Tensor, rows: range, num_rows: int, *, tied: bool) -> Tensor:
        """The output projection of these rows of [num_rows, hidden], like the `embedding` of them.

        Raises ConfigurationError if an untied one is missing.
        """
        if tied:
            return self.rows_or(name, embedding, rows, num_rows)
        return self.rows(name, rows, num_rows, embedding.shape[1])

    def output_layer(self, name: str, embedding: Tensor, rows: range, num_rows: int, *, tied: bool) -> Linear:
        """The same as a layer, which is kept packed where it is stored so."""
        layer = self._packed_layer(name)
        if self._packer is None or layer is None:
            return Linear(self.output_weight(name, embedding, rows, num_rows, tied=tied))
        shape = num_rows, embedding.shape[1]
        kept = _part_of(self._source(name, shape), (_existing(rows, num_rows),), slice(0, shape[1]))
        return self._packed(self._packer, [StoredPart(layer, kept)], None, None)

    def _packed(
        self, packer: WeightPacker, parts: Iterable[StoredPart], bias: Tensor | None, delta: Delta | None
    ) -> Linear:
        packed = packer.pack(parts, bias)
        self.loaded_bytes += packed.num_bytes
        return Linear.of_product(packed.product, packed.shape, delta)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _packed_layer(self, name: str) -> str | None:
        """The layer whose weight `name` is, if it is stored packed."""
        layer, _, kind = name.rpartition(".")
        if self._quantization is None or kind != "weight" or not self._quantization.is_packed(layer, self):
            return None
        return layer

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of `shape` as it is stored, or unpacked. Of a safetensors file it is a view."""
        return _floats(self._source(name, shape))

    def _source(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> Tensor | GroupedWeight:
        """The tensor of `shape` as it is stored.

        transposed: it is stored with its two dimensions the other way round, unless it is packed.
        """
        layer = self._packed_layer(name)
        if layer is not None:
            return self._read_packed(layer, shape)
        return self._read_floats(name, shape[::-1]).T if transposed else self._read_floats(name, shape)

    def _read_packed(self, layer: str, shape: tuple[int, ...]) -> GroupedWeight:
        assert self._quantization is not None, "only a quantized checkpoint has packed layers"
        weight = self._quantization.weight(layer, shape[-1], self)
        if weight.shape != shape:
            raise ConfigurationError(
                f"{self.directory}: the packed weight of {layer} has shape {list(weight.shape)}, "
                f"but config.json asks for {list(shape)}"
            )
        self.stores_half = False
        return weight

    def _read_floats(self, name: str, expected: tuple[int, ...]) -> Tensor:
        if name not in self._tensors:
            raise ConfigurationError(f"{self.directory} has no tensor {name}")
        file, stored_name = self._tensors[name]
        shape, unreadable = self._handles[file].describe(stored_name)
        if shape != expected:
            raise ConfigurationError(
                f"{self.directory / file}: tensor {stored_name} has shape {list(shape)}, "
                f"but config.json asks for {list(expected)}"
            )
        if unreadable is not None:
            raise ConfigurationError(
                f"{self.directory / file}: tensor {stored_name} is stored as {unreadable}, not as floats"
            )
        stored = self._handles[file].read(stored_name)
        self.stores_half &= stored.dtype in _HALF_DTYPES or len(shape) < 2
        self._progress.update()
        return stored

    def _fill(self, target: Tensor, sources: Iterable[Tensor], rows: Sequence[Sequence[slice]]) -> None:
        """Copy to `target` rows[i] of source i, one range behind the other, and count them."""
        start = 0
        for source, ranges in zip(sources, rows, strict=True):
            for part in (source[each] for each in ranges):
                target[start : start + len(part)].copy_(part)
                start += len(part)
        self.loaded_bytes += target.nbytes


def _floats(source: Tensor | GroupedWeight) -> Tensor:
    return source if isinstance(source, Tensor) else source.dequantize()


def _part_of(source: Tensor | GroupedWeight, ranges: Sequence[slice], columns: slice) -> Tensor | GroupedWeight:
    """The outputs in `ranges`, one range behind the other, and of each the inputs `columns`."""
    if isinstance(source, Tensor):
        return torch.cat([source[each] for each in ranges])[:, columns]
    return source.rows(ranges).columns(columns)


def _existing(rows: range, num_rows: int) -> slice:
    return slice(min(rows.start, num_rows), min(rows.stop, num_rows))


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
