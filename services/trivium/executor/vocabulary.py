"""Rows of numbers over the vocabulary: logits, scores, probabilities. What needs to look at a whole row is here.

On one rank a row is all there. Split over ranks, each has the columns of its own tokens, and what is asked of the whole
row is put together from what every rank knows of its part: no rank ever sees the others' logits, except by `gather`.
Whatever looks at single columns works on a part as it does on a whole.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.executor import largest
from trivium.executor.parallel.shard import Shard, part_of_vocabulary


class Vocabulary(Protocol):
    """x: [num_rows, columns of this rank], the columns of the tokens from `start` on.

    All ranks call the same methods in the same order, with the same number of rows, and get the same answers.
    """

    start: int

    def size(self, x: Tensor) -> int:
        """Tokens of all ranks."""
        ...

    def argmax(self, x: Tensor) -> Tensor:
        """[num_rows] token with the largest number, the first of equals."""
        ...

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(values, tokens), both [num_rows, k] in descending order; k is at most the size."""
        ...

    def amax(self, x: Tensor) -> Tensor:
        """[num_rows, 1]"""
        ...

    def logsumexp(self, x: Tensor) -> Tensor:
        """[num_rows, 1]"""
        ...

    def log_softmax(self, x: Tensor) -> Tensor:
        """[num_rows, columns of this rank]"""
        ...

    def softmax(self, x: Tensor) -> Tensor:
        """[num_rows, columns of this rank]"""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """[num_rows], floats as float64."""
        ...

    def pick(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """[num_rows, 1] the number of one token of each row; token_ids: [num_rows]."""
        ...

    def draw(self, weights: Tensor, uniform: Tensor) -> Tensor:
        """[num_rows] the first token whose cumulated weight exceeds uniform * sum; weights need not sum to 1."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """[num_rows, size] whole rows, on every rank."""
        ...

    def own(self, whole: Tensor) -> Tensor:
        """The columns of this rank of whole rows."""
        ...


class WholeVocabulary:
    """One rank has everything."""

    start = 0

    def size(self, x: Tensor) -> int:
        return x.shape[1]

    def argmax(self, x: Tensor) -> Tensor:
        return largest.argmax(x)

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return largest.top_k(x, k)

    def amax(self, x: Tensor) -> Tensor:
        return x.amax(dim=-1, keepdim=True)

    def logsumexp(self, x: Tensor) -> Tensor:
        return x.logsumexp(dim=-1, keepdim=True)

    def log_softmax(self, x: Tensor) -> Tensor:
        return torch.log_softmax(x, dim=-1)

    def softmax(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=-1)

    def sum(self, x: Tensor) -> Tensor:
        return _row_sums(x)

    def pick(self, x: Tensor, token_ids: Tensor) -> Tensor:
        return x.gather(1, token_ids[:, None])

    def draw(self, weights: Tensor, uniform: Tensor) -> Tensor:
        return inverse_cdf(weights, uniform)

    def gather(self, x: Tensor) -> Tensor:
        return x

    def own(self, whole: Tensor) -> Tensor:
        return whole


WHOLE = WholeVocabulary()


class SplitVocabulary:
    """Each rank has the tokens that `Shard.tokens` gives it."""

    def __init__(self, shard: Shard, vocab_size: int) -> None:
        parts = [part_of_vocabulary(vocab_size, rank, shard.size) for rank in range(shard.size)]
        self.start = parts[shard.rank].start
        self._communicator = shard.communicator
        self._size = vocab_size
        self._widths = [len(part) for part in parts]  # of each rank

    def size(self, x: Tensor) -> int:
        return self._size

    def argmax(self, x: Tensor) -> Tensor:
        columns = largest.argmax(x)[:, None]
        values, tokens = self._gather_pairs(x.gather(1, columns), columns + self.start)  # [size, num_rows, 1]
        return tokens.gather(0, values.argmax(dim=0, keepdim=True)).flatten()

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Among the best of every rank are the best of all."""
        counts = [min(k, width) for width in self._widths]
        values, columns = largest.top_k(x, min(k, x.shape[1]))
        padding = (0, max(counts) - values.shape[1])
        gathered = self._gather_pairs(F.pad(values, padding), F.pad(columns + self.start, padding))
        values, tokens = (
            torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], dim=1) for parts in gathered
        )
        values, places = values.topk(k, dim=-1)
        return values.to(x.dtype), tokens.gather(1, places)

    def amax(self, x: Tensor) -> Tensor:
        return self._communicator.gather(x.amax(dim=-1, keepdim=True)).amax(dim=0)

    def logsumexp(self, x: Tensor) -> Tensor:
        return self._communicator.gather(x.logsumexp(dim=-1, keepdim=True)).logsumexp(dim=0)

    def log_softmax(self, x: Tensor) -> Tensor:
        return x - self.logsumexp(x)

    def softmax(self, x: Tensor) -> Tensor:
        return self.log_softmax(x).exp_()

    def sum(self, x: Tensor) -> Tensor:
        return self._communicator.sum(_row_sums(x))

    def pick(self, x: Tensor, token_ids: Tensor) -> Tensor:
        columns = token_ids[:, None] - self.start
        is_elsewhere = (columns < 0) | (columns >= x.shape[1])
        found = x.gather(1, columns.masked_fill(is_elsewhere, 0))
        return self._communicator.sum(found.masked_fill_(is_elsewhere, 0.0))

    def draw(self, weights: Tensor, uniform: Tensor) -> Tensor:
        """The rank in whose part the number falls looks for the token; the others add nothing to its answer."""
        rank = self._communicator.rank
        cumulated = weights.double().cumsum(dim=-1)
        sums = self._communicator.gather(cumulated[:, -1])  # [size, num_rows]
        ends = sums.cumsum(dim=0)
        target = uniform * ends[-1]
        owner = (ends <= target).sum(dim=0).clamp_(max=len(ends) - 1)
        before = ends[rank - 1] if rank else torch.zeros_like(target)
        # Rounding must not carry the number past the last token that has a weight.
        inside = (target - before).minimum(sums[rank].nextafter(torch.zeros_like(target)))
        columns = torch.searchsorted(cumulated, inside[:, None], right=True).squeeze(1)
        columns.clamp_(max=weights.shape[1] - 1)  # only where the token is elsewhere
        return self._communicator.sum((columns + self.start).masked_fill_(owner != rank, 0))

    def gather(self, x: Tensor) -> Tensor:
        parts = self._communicator.gather(F.pad(x, (0, max(self._widths) - x.shape[1])))
        return torch.cat([part[:, :width] for part, width in zip(parts, self._widths, strict=True)], dim=1)

    def own(self, whole: Tensor) -> Tensor:
        return whole.narrow(1, self.start, self._widths[self._communicator.rank])

    def _gather_pairs(self, values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(values, tokens) of all ranks, each [size, num_rows, n], in one exchange: float64 holds both exactly."""
        pairs = self._communicator.gather(torch.cat((values.double(), tokens.double()), dim=1))
        gathered_values, gathered_tokens = pairs.chunk(2, dim=-1)
        return gathered_values, gathered_tokens.long()


def make_vocabulary(shard: Shard, vocab_size: int) -> Vocabulary:
    return WHOLE if shard.size == 1 else SplitVocabulary(shard, vocab_size)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulated weight exceeds uniform * total; weights [num_rows, n] need not sum to 1."""
    cumulated = weights.double().cumsum(dim=-1)
    index = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True).squeeze(1)
    return index.clamp_(max=weights.shape[1] - 1)  # only weights that are not numbers get this far


def _row_sums(x: Tensor) -> Tensor:
    return x.sum(dim=-1, dtype=torch.float64 if x.is_floating_point() else None)
