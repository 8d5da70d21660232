"""`reshape_and_cache` in plain torch."""

from __future__ import annotations

from torch import Tensor


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    block_size = key_cache.shape[1]
    row_width = key_cache.shape[2] * key_cache.shape[3]
    # Seen as rows of one token each, a block starts every `rows_per_block` rows; rows of other layers lie between.
    rows_per_block = key_cache.stride(0) // row_width
    rows = slot_mapping + (slot_mapping // block_size) * (rows_per_block - block_size)
    shape = ((key_cache.shape[0] - 1) * rows_per_block + block_size, row_width)
    for source, cache in ((key, key_cache), (value, value_cache)):
        flat = cache.as_strided(shape, (row_width, 1))  # [rows, num_kv_heads * head_dim]
        flat.index_copy_(0, rows, source.reshape(-1, row_width))
