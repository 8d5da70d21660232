"""How arguments reach the module: tensors as addresses, floats as the bits of a float32, all of them integers."""

from __future__ import annotations

import struct
from functools import lru_cache

from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """`x`, which is float32, with its last dimension side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_of(x: Tensor) -> Tensor:
    """`x` [num_tokens, num_heads, head_dim], which is float32, with the heads of a token side by side."""
    x = rows_of(x)
    return x if x.stride(1) == x.shape[2] or x.shape[1] == 1 else x.contiguous()


@lru_cache(maxsize=256)
def bits(value: float) -> int:
    """The bits of a float32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
