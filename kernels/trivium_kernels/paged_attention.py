"""Attention of packed queries to keys and values that lie in blocks of a pool (https://arxiv.org/abs/2309.06180).

Row r has queries [cu_seqlens_q[r], cu_seqlens_q[r + 1]) and keys 0 .. context_lens[r] - 1, key j being token
j % block_size of block block_tables[r, j // block_size]. Its last query stands at position context_lens[r] - 1:

    out[i] = softmax_j(cap(scale * q[i] . k[j]) + bias[j - i]) v[j],   j <= i and j > i - window if causal

cap(s) is soft_cap * tanh(s / soft_cap), or s itself without a soft cap.

Non-causal rows (cross-attention) see all their keys. The op comes in two halves because every layer of a step shares
the tables, lengths and masks: PlanPagedAttention runs once per step, PagedAttention once per layer.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class PagedAttentionPlan:
    """What all layers of one step share. Made by PlanPagedAttention, read only by PagedAttention of its device."""

    __slots__ = ()


class PlanPagedAttention(Protocol):
    def __call__(
        self,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        *,
        block_size: int,
        causal: bool,
        window: int | None = None,
        bias_table: Tensor | None = None,
    ) -> PagedAttentionPlan:
        """Prepare attention of one step.

        block_tables: [num_rows, max_blocks] integer; columns past a row's context are ignored, but must name blocks of
        the pool. context_lens: [num_rows], each at least the row's number of queries if causal, at least 1 otherwise.
        cu_seqlens_q: [num_rows + 1], starts with 0; it is read on the host, so it had better be there. Rows with one
        query run fastest when they come first and in the order of their context; neighbours with the same blocks, as
        the beams of a request have for cross-attention, read them once. window: a causal query sees itself and
        window - 1 keys before it; needs causal.
        bias_table: [num_heads, 2 * max_distance + 1], the bias of distance d = key position - query position in column
        clamp(d, -max_distance, max_distance) + max_distance.
        """
        ...


class PagedAttention(Protocol):
    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        plan: PagedAttentionPlan,
        *,
        scale: float,
        soft_cap: float | None = None,
    ) -> Tensor:
        """query [num_tokens, num_heads, head_dim]; caches [num_blocks, block_size, num_kv_heads, head_dim] (views).

        num_heads is a multiple of num_kv_heads: query head h reads key head h // (num_heads // num_kv_heads).
        Returns [num_tokens, num_heads, head_dim].
        """
        ...
