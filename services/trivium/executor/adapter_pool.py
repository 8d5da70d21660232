"""LoRA adapters of one model: which are loaded, and which rows of the step that runs have which.

The linear layers are told apart when the model is built (`add_layer`); adapters come later (`load`). Before each
forward pass the runner says which adapter each of its rows has (`use`); the layers' deltas read that while it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trivium.errors import ConfigurationError
from trivium.executor import transfers
from trivium.executor.parallel.shard import Split
from trivium.executor.peft import HUB_PATTERNS, LoraModule, read_adapter
from trivium.model_source import find_model
from trivium_kernels.add_lora import AddLora, LoraExpand, LoraWeights

logger = logging.getLogger(__name__)


class LoraDelta:
    """The adapters of one layer, or of several that are stacked into one. Owner: AdapterPool.

    weights: adapter index -> its matrices, for the adapters that change this layer. Of a layer that is split it is the
    part that goes with the layer's: rows of B, or columns of A, whose products are summed with those of the layer.
    """

    def __init__(
        self, pool: AdapterPool, names: Sequence[str], widths: Sequence[int], in_features: int, split: Split | None
    ) -> None:
        self.names = tuple(names)
        self._split = split or Split()
        self.weights: dict[int, LoraWeights] = {}
        self._pool = pool
        self._widths = tuple(widths)
        self._in_features = in_features

    def add_to(self, y: Tensor, x: Tensor) -> None:
        if self._pool.groups:
            weights = self.weights
            groups = [(rows, weights[index]) for index, rows in self._pool.groups if index in weights]
            if groups:
                self._pool.add_lora(y, x, groups)

    def set(self, index: int, modules: dict[str, LoraModule]) -> None:
        """Take the matrices of adapter `index` that are for this layer. Raises ConfigurationError by shape."""
        shrink: list[Tensor] = []
        expand: list[LoraExpand] = []
        start = first_rank = 0
        rows = self._split.rows or [(slice(0, width),) for width in self._widths]
        for name, width, ranges in zip(self.names, self._widths, rows, strict=True):
            module = modules.get(name)
            if module is not None:
                shape = len(module.expand), module.shrink.shape[1]
                if shape != (width, self._in_features):
                    raise ConfigurationError(
                        f"{name} of the adapter is for a layer {list(shape)}, "
                        f"the model's is {[width, self._in_features]}"
                    )
                shrink.append(module.shrink[:, self._split.columns or slice(None)].contiguous())
                expand.append(LoraExpand(start, first_rank, torch.cat([module.expand[part] for part in ranges])))
                first_rank += module.rank
            start += sum(part.stop - part.start for part in ranges)
        if shrink:
            place = self._pool.place
            placed = [LoraExpand(part.start, part.first_rank, place(part.matrix)) for part in expand]
            self.weights[index] = LoraWeights(place(torch.cat(shrink)), tuple(placed))


class AdapterPool:
    """Owned by the ModelRunner, and touched only by its thread.

    indices: adapter name -> its number from 1 on; 0 is no adapter. groups: (adapter, its rows or None for all) of the
    forward pass that runs; empty if none of its rows has an adapter. device, dtype: of the layers.
    """

    def __init__(
        self,
        add_lora: AddLora,
        *,
        max_rank: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.add_lora = add_lora
        self._device = device or torch.device("cpu")
        self._dtype = dtype
        self.indices: dict[str, int] = {}
        self.groups: tuple[tuple[int, Tensor | None], ...] = ()
        self._max_rank = max_rank
        self._layers: dict[str, LoraDelta] = {}  # layer name -> where its adapters are

    def place(self, matrix: Tensor) -> Tensor:
        return matrix.to(self._device, self._dtype)

    def add_layer(
        self, names: Sequence[str], widths: Sequence[int], in_features: int, split: Split | None = None
    ) -> LoraDelta:
        """The delta of the layers `names`, each `widths`[i] wide, stacked into one; `split`: of what of them."""
        delta = LoraDelta(self, names, widths, in_features, split)
        self._layers.update(dict.fromkeys(names, delta))
        return delta

    def load(self, name: str, source: str) -> None:
        """Load an adapter from a directory or the hub. Raises ConfigurationError, having changed nothing.

        Every layer that it names must be one that the model runs on all rows of a step.
        """
        try:
            modules = read_adapter(find_model(source, None, patterns=HUB_PATTERNS), self._max_rank)
            unknown = next((module for module in modules if module not in self._layers or ".experts." in module), None)
            if unknown is not None:
                raise ConfigurationError(f"target module {unknown} is not supported for this model")
            index = len(self.indices) + 1
            for delta in {id(delta): delta for delta in map(self._layers.__getitem__, modules)}.values():
                delta.set(index, modules)
        except ConfigurationError as error:
            for delta in self._layers.values():
                delta.weights.pop(len(self.indices) + 1, None)
            raise ConfigurationError(f"adapter {name!r}: {error.message}") from None
        self.indices[name] = index
        logger.info("adapter %s: %d layers, rank %d", name, len(modules), max(m.rank for m in modules.values()))

    def use(self, indices: NDArray[np.int64]) -> None:
        """Row i of the coming forward pass has adapter indices[i]."""
        self.groups = tuple(
            (int(index), None if len(rows) == len(indices) else transfers.upload(rows, self._device))
            for index in np.unique(indices)
            if index
            for rows in (np.flatnonzero(indices == index),)
        )
