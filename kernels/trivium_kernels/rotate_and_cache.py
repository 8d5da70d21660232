"""Rotary embedding of queries and keys and the write into the paged cache, in one pass over the merged projection.

The same as: norm of each query and key head (`rms_norm`), where the model has one; `rotary_embedding`;
`reshape_and_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm of every head by itself: weights [head_dim] of queries and of keys."""

    query: Tensor
    key: Tensor
    eps: float


class RotateAndCache(Protocol):
    def __call__(
        self,
        qkv: Tensor,
        rotation: tuple[Tensor, Tensor],
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """Returns the rotated queries [num_tokens, num_heads, head_dim], a new tensor.

        qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim]: queries, keys, values; any stride between tokens.
        rotation: cos and signed sin as `rotary_embedding` takes them. Caches and slot_mapping: as of
        `reshape_and_cache`; a token whose slot is negative is written nowhere, it fills up a step of fixed size.
        """
        ...
