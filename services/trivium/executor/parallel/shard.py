"""What one rank has of a model: which heads, which part of a feed-forward, which tokens of the vocabulary.

Attention and feed-forward are each a layer whose outputs are split, then one whose inputs are split
(https://arxiv.org/abs/1909.08053, 3): between the two nothing has to be exchanged, and behind them the ranks add up.
A model that is not split has one rank with everything; then nothing here is in the way of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from trivium.errors import ConfigurationError
from trivium.executor.linear import Product
from trivium.executor.parallel.communicator import ALONE, Communicator

# Tokens that stay together: the bits of a grammar's mask come in words of 32.
VOCABULARY_UNIT = 32

Embedding: TypeAlias = Callable[[Tensor], Tensor]  # token_ids [num_tokens] -> a new tensor [num_tokens, width]


@dataclass(frozen=True, slots=True)
class Split:
    """What a rank has of layers that are stacked into one.

    rows[i]: ranges of the outputs of layer i, in the order in which they are wanted; None: all of all layers.
    columns: the inputs that the rank has, None for all; what it computes is then to be summed over the ranks.
    """

    rows: tuple[tuple[slice, ...], ...] | None = None
    columns: slice | None = None


@dataclass(frozen=True, slots=True)
class SummedLayer:
    """A layer, or a block of layers, of which each rank has a part. What is added comes from the first rank."""

    layer: Product
    communicator: Communicator

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return self.communicator.sum(self.layer(x, None if self.communicator.rank else add))


@dataclass(frozen=True, slots=True)
class WholeEmbedding:
    """token_ids [num_tokens] -> [num_tokens, width], in a new tensor. table: [vocab_size, width]."""

    table: Tensor

    def __call__(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.table)


@dataclass(frozen=True, slots=True)
class SplitEmbedding:
    """The same of a table of which each rank has some rows, `table` those from `start` on."""

    table: Tensor
    start: int
    communicator: Communicator

    def __call__(self, token_ids: Tensor) -> Tensor:
        rows = token_ids - self.start
        is_elsewhere = (rows < 0) | (rows >= len(self.table))
        found = F.embedding(rows.masked_fill_(is_elsewhere, 0), self.table)
        return self.communicator.sum(found.masked_fill_(is_elsewhere[:, None], 0.0))


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of one rank. Its methods raise ConfigurationError for what cannot be split over so many ranks."""

    communicator: Communicator = ALONE

    @property
    def rank(self) -> int:
        return self.communicator.rank

    @property
    def size(self) -> int:
        return self.communicator.size

    def part(self, total: int, what: str) -> range:
        """An equal part of `total` things, which an error calls `what`."""
        if total % self.size:
            raise ConfigurationError(f"tensor_parallel_size {self.size} does not divide the model's {total} {what}")
        width = total // self.size
        return range(self.rank * width, (self.rank + 1) * width)

    def kv_heads(self, num_kv_heads: int) -> range:
        """Key heads: an equal part, or one that several ranks have, where there are more ranks than key heads."""
        if self.size <= num_kv_heads:
            return self.part(num_kv_heads, "key heads")
        if self.size % num_kv_heads:
            raise ConfigurationError(
                f"tensor_parallel_size {self.size} is not a multiple of the model's {num_kv_heads} key heads"
            )
        head = self.rank * num_kv_heads // self.size
        return range(head, head + 1)

    def tokens(self, vocab_size: int) -> range:
        """Tokens of the vocabulary, as even as whole units allow."""
        return part_of_vocabulary(vocab_size, self.rank, self.size)

    def outputs(self, widths: Sequence[int], what: str) -> Split | None:
        """Layers of these widths, of each an equal part."""
        if self.size == 1:
            return None
        return Split(rows=tuple((as_slice(self.part(width, what)),) for width in widths))

    def inputs(self, width: int, what: str) -> Split | None:
        """A layer behind one whose outputs are split. The result must be `summed`."""
        return None if self.size == 1 else Split(columns=as_slice(self.part(width, what)))

    def summed(self, layer: Product) -> Product:
        """`layer`, of which this rank has a part, as all ranks together compute it."""
        return layer if self.size == 1 else SummedLayer(layer, self.communicator)

    def embedding(self, table: Tensor, tokens: range) -> Embedding:
        """Embeds any token, with the rows of `tokens` here and the others elsewhere."""
        if self.size == 1:
            return WholeEmbedding(table)
        return SplitEmbedding(table, tokens.start, self.communicator)


def part_of_vocabulary(vocab_size: int, rank: int, size: int) -> range:
    """The tokens of one of `size` ranks. Raises ConfigurationError if one would have none."""
    num_units = -(-vocab_size // VOCABULARY_UNIT)
    if num_units < size:
        raise ConfigurationError(
            f"tensor_parallel_size {size} is too large for a vocabulary of {vocab_size} tokens: "
            f"every rank needs {VOCABULARY_UNIT} of them"
        )
    start, stop = (num_units * place // size * VOCABULARY_UNIT for place in (rank, rank + 1))
    return range(start, min(stop, vocab_size))


def as_slice(part: range) -> slice:
    return slice(part.start, part.stop)
