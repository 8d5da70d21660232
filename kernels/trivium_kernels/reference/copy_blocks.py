"""`copy_blocks` in plain torch."""

from __future__ import annotations

from torch import Tensor


def copy_blocks(source: Tensor, target: Tensor, from_blocks: Tensor, to_blocks: Tensor) -> None:
    kept = (from_blocks >= 0) & (to_blocks >= 0)
    target.flatten(1).index_copy_(0, to_blocks[kept], source.flatten(1).index_select(0, from_blocks[kept]))
