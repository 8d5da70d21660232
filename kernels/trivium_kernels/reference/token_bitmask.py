"""`token_bitmask` in plain torch."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def apply_token_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    # Eight tokens at once, and added: on a CPU masked_fill_ takes six to ten times as long.
    table = _scores_of_bytes(logits.device, logits.dtype)
    scores = table.index_select(0, bitmask.view(torch.uint8).flatten().int()).view(len(bitmask), -1)
    logits.index_add_(0, rows, scores[:, : logits.shape[1]])


@cache
def _scores_of_bytes(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 8] what to add to the logits of eight tokens: 0 where their bit in the byte is set, else -inf."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.zeros(256, 8).masked_fill(bits == 0, -torch.inf).to(device, dtype)
