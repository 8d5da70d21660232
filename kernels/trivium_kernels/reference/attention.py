"""What both attention ops have in common: one sequence, and masks by distance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """One sequence: query [queries, num_heads, head_dim], key and value [keys, num_kv_heads, head_dim].

    mask: as `mask_of_reversed_queries` makes it.
    """
    attended = F.scaled_dot_product_attention(
        (query if mask is None else query.flip(0)).transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        attn_mask=None if mask is None else mask.unsqueeze(0),
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # [1, num_heads, queries, head_dim]
    output = attended.squeeze(0).transpose(0, 1)
    return output if mask is None else output.flip(0)


def mask_of_reversed_queries(
    num_queries: int, num_keys: int, *, causal: bool, window: int | None, bias_table: Tensor | None
) -> Tensor:
    """[num_heads or 1, num_queries, num_keys]; row r is for query num_queries - 1 - r, row 0 at the last key.

    All masks here depend on the distance alone. In reversed order each row is the one before it, moved by one, so
    that the whole mask is a view of num_queries + num_keys - 1 numbers per head.
    """
    device = None if bias_table is None else bias_table.device
    distance = torch.arange(1 - num_keys, num_queries, device=device)
    mask = bias_at(bias_table, distance)
    if causal:
        mask = mask.masked_fill(distance > 0, -torch.inf)
    if window is not None:
        mask = mask.masked_fill(distance <= -window, -torch.inf)
    return mask.unfold(1, num_keys, 1)


def bias_at(bias_table: Tensor | None, distance: Tensor) -> Tensor:
    """[num_heads, *distance.shape], or zeros [1, *distance.shape] without a table."""
    if bias_table is None:
        return torch.zeros((1, *distance.shape), device=distance.device)
    max_distance = bias_table.shape[1] // 2
    return bias_table[:, distance.clamp(-max_distance, max_distance) + max_distance]
