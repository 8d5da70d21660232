"""What attention needs to know about one step. An argument of every forward pass, never a global."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trivium_kernels.dispatch import Kernels
from trivium_kernels.paged_attention import PagedAttentionPlan


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Keys and values of every row of the step in the pool.

    block_tables: [num_rows, max_blocks] int32. context_lens: [num_rows] int32, including the tokens of this step.
    """

    block_tables: Tensor
    context_lens: Tensor


@dataclass(frozen=True, slots=True)
class LastTokens:
    """Rows of a step of which the last token's hidden state is wanted: rows[i] of the step ends with tokens[i].

    rows, tokens: [num_wanted >= 1] int64, ascending.
    """

    rows: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step's rows, packed: row r has tokens [cu_seqlens_q[r], cu_seqlens_q[r + 1]).

    cu_seqlens_q: [num_rows + 1], on the host. slot_mapping: [num_tokens] int64, where each token's key and value go.
    cross_rows: the encoder's keys and values; None for decoder-only models. max_model_len: the longest context that is
    served, whatever these rows have. last: what is wanted of the decoder; None for the hidden states of all tokens.
    """

    cu_seqlens_q: Tensor
    slot_mapping: Tensor
    self_rows: PagedRows
    cross_rows: PagedRows | None
    max_model_len: int
    last: LastTokens | None = None

    def wanted(self, hidden: Tensor) -> Tensor:
        """Of [num_tokens, hidden], the rows that are wanted."""
        return hidden if self.last is None else hidden[self.last.tokens]

    def of_last(self, last: LastTokens) -> AttentionMetadata:
        """For the queries of these tokens alone, in a layer that has all keys and values."""
        rows = self.self_rows
        return replace(
            self,
            cu_seqlens_q=torch.arange(len(last.rows) + 1),
            self_rows=PagedRows(rows.block_tables[last.rows], rows.context_lens[last.rows]),
            last=None,
        )

    def plan_self(
        self, kernels: Kernels, block_size: int, *, window: int | None = None, bias_table: Tensor | None = None
    ) -> PagedAttentionPlan:
        """Causal attention of all layers with this window and bias."""
        return kernels.plan_paged_attention(
            self.self_rows.block_tables,
            self.self_rows.context_lens,
            self.cu_seqlens_q,
            block_size=block_size,
            causal=True,
            window=window,
            bias_table=bias_table,
        )

    def plan_cross(self, kernels: Kernels, block_size: int) -> PagedAttentionPlan:
        """Attention of all layers to the encoder's keys and values."""
        assert self.cross_rows is not None, "a decoder-only step has no cross-attention"
        return kernels.plan_paged_attention(
            self.cross_rows.block_tables,
            self.cross_rows.context_lens,
            self.cu_seqlens_q,
            block_size=block_size,
            causal=False,
        )
