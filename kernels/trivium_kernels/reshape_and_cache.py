"""Write the keys and values of a step into the paged cache."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ReshapeAndCache(Protocol):
    def __call__(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """cache[slot // block_size, slot % block_size] = row, for keys and values.

        key, value: [num_tokens, num_kv_heads, head_dim], any stride between tokens. key_cache, value_cache: views
        [num_blocks, block_size, num_kv_heads, head_dim]; only the stride between blocks may be larger than the block.
        slot_mapping: [num_tokens] int64, no slot twice.
        """
        ...
