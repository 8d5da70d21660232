"""Linear layers over packed rows. The one place where a faster matrix product is put behind the same call.

A Linear begins with its weight as it was loaded. `linear_tuning` later exchanges that for a packed one. Owner: the
model graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Product(Protocol):
    """How a layer multiplies, bias included."""

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x [num_rows >= 1, in_features] -> a new tensor [num_rows, out_features], with `add` like it added."""
        ...


class StoredWeight(Protocol):
    """A weight that a checkpoint stores packed, as int4 or fp8 for example. Read only."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        ...

    def dequantize(self) -> Tensor:
        """The weight [out_features, in_features] in float32, made anew."""
        ...


class Delta(Protocol):
    """What the adapters of a step's rows add to a layer."""

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Change y [num_rows, out_features], which the layer has made of x [num_rows, in_features], in place."""
        ...


class Linear:
    """y = x weight^T + bias. weight: [out_features, in_features], bias: [out_features] or None.

    A StoredWeight is dequantized in every call until the weight is packed: correct, and slow. delta: only where
    adapters can be loaded.
    """

    __slots__ = ("_product", "bias", "delta", "shape", "weight")

    def __init__(self, weight: Tensor | StoredWeight, bias: Tensor | None = None, delta: Delta | None = None) -> None:
        self.weight: Tensor | StoredWeight | None = weight  # None once only a packed one is kept
        self.bias = bias
        self.delta = delta
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self._product: Product = self._plain

    @classmethod
    def of_product(cls, product: Product, shape: tuple[int, int], delta: Delta | None = None) -> Linear:
        """A layer whose weight [out_features, in_features] nobody has but `product`."""
        linear = cls(torch.empty(shape, device="meta"), None, delta)
        linear.use(product)
        return linear

    @property
    def product(self) -> Product:
        """How it multiplies now."""
        return self._product

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x [num_rows, in_features] -> [num_rows, out_features], with `add` like it added: a residual."""
        if x.shape[0] == 0:
            return x.new_empty((0, self.shape[0]))
        y = self._product(x, add)
        if self.delta is not None:
            self.delta.add_to(y, x)
        return y

    def dense_weight(self) -> Tensor:
        """The weight in float32. Only before `use`."""
        assert self.weight is not None, "the weight was given up for a packed one"
        return self.weight if isinstance(self.weight, Tensor) else self.weight.dequantize()

    def use(self, product: Product) -> None:
        """Compute with `product`, which has packed the weight, and drop it."""
        self.weight = None
        self._product = product

    def _plain(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.dense_weight(), self.bias)
        return y if add is None else y.add_(add)


def find_linears(graph: object) -> list[Linear]:
    """Every Linear that `graph` holds, in the order of its attributes, each once."""
    found: dict[int, Linear] = {}
    _collect(graph, found, {})
    return list(found.values())


def _collect(value: object, found: dict[int, Linear], seen: dict[int, object]) -> None:
    """seen: what was visited, by its id. It is kept there, or something made later could have the same id."""
    if id(value) in seen or isinstance(value, (Tensor, torch.dtype, str, bytes, type)):
        return
    seen[id(value)] = value
    if isinstance(value, Linear):
        found[id(value)] = value
    for part in _parts(value):
        _collect(part, found, seen)


def _parts(value: object) -> Iterable[object]:
    """What `value` holds in which there can be a Linear."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, Linear):
        return ()
    if is_dataclass(value):
        return [getattr(value, item.name) for item in fields(value)]
    if type(value).__module__.startswith("trivium.executor"):
        return list(getattr(value, "__dict__", {}).values())
    return ()
