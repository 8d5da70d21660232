"""Attention inside packed sequences of different lengths, without padding: encoders.

out[i] = softmax_j(scale * q[i] . k[j] + bias[j - i]) v[j],   j in the sequence of i, j <= i if causal
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class VarlenAttentionPlan:
    """What all layers of one pass share. Made by PlanVarlenAttention, read only by VarlenAttention of its device."""

    __slots__ = ()


class PlanVarlenAttention(Protocol):
    def __call__(
        self,
        cu_seqlens: Tensor,
        *,
        causal: bool,
        bias_table: Tensor | None = None,
        device: torch.device | None = None,
    ) -> VarlenAttentionPlan:
        """Prepare attention over sequences [cu_seqlens[i], cu_seqlens[i + 1]) of a pack.

        cu_seqlens: [num_sequences + 1], starts with 0; it is read on the host, so it had better be there. device: of
        the pack, if that is not the device of `cu_seqlens`. bias_table: see `paged_attention.PlanPagedAttention`.
        """
        ...


class VarlenAttention(Protocol):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: VarlenAttentionPlan, *, scale: float) -> Tensor:
        """query [num_tokens, num_heads, head_dim]; key, value [num_tokens, num_kv_heads, head_dim].

        num_heads is a multiple of num_kv_heads: query head h reads key head h // (num_heads // num_kv_heads).
        Returns [num_tokens, num_heads, head_dim].
        """
        ...
