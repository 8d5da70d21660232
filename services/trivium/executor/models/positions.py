"""Position embeddings of encoder-decoder models: tables that are learned or computed, and which row is whose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PositionTable:
    """table: [num_rows, hidden]. Position p is row p + offset.

    padding_id, where it is set, is the row of every padding token; in an encoder such tokens are not counted either.
    """

    table: Tensor
    offset: int = 0
    padding_id: int | None = None

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[num_tokens] ids and positions -> [num_tokens, hidden]."""
        rows = positions + self.offset
        if self.padding_id is not None:
            rows = rows.masked_fill(token_ids == self.padding_id, self.padding_id)
        return F.embedding(rows, self.table)

    def skip_padding(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Positions of packed whole sequences, each counted from 0, as if padding tokens took no place."""
        if self.padding_id is None:
            return positions
        is_padding = (token_ids == self.padding_id).long()
        num_before = is_padding.cumsum(0) - is_padding
        starts = torch.arange(len(positions), device=positions.device) - positions
        return positions - (num_before - num_before[starts])


def sinusoidal_table(num_positions: int, hidden_size: int) -> Tensor:
    """Sines in the first half of the columns, cosines in the second: [num_positions, hidden_size].

    Column pairs as in https://arxiv.org/abs/1706.03762, 3.5, where sines and cosines alternate.
    """
    exponents = torch.arange(0, hidden_size, 2, dtype=torch.float64) / hidden_size
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] / 10000**exponents
    return torch.cat((angles.sin(), angles[:, : hidden_size // 2].cos()), dim=1).float()


def padded_sinusoidal_table(num_positions: int, hidden_size: int, padding_id: int) -> Tensor:
    """As tensor2tensor has it: the last frequency is exactly 1 / 10000, and row `padding_id` is zero.

    In float32 throughout, as the models were trained. An odd last column is zero.
    """
    half = hidden_size // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(num_positions).float()[:, None] * frequencies
    table = F.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, hidden_size % 2))
    table[padding_id] = 0
    return table
