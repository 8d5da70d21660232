"""`token_bitmask` in C++: words that allow all of their tokens cost nothing, and nothing is stored between."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium_kernels import reference
from trivium_kernels.cpu import _native
from trivium_kernels.cpu.addresses import rows_of


def apply_token_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    if logits.dtype is not torch.float32 or logits.stride(1) != 1:
        reference.apply_token_bitmask(logits, bitmask, rows)
        return
    bitmask, rows = rows_of(bitmask), rows_of(rows)
    _native.apply_token_bitmask(
        logits.data_ptr(),
        bitmask.data_ptr(),
        rows.data_ptr(),
        len(bitmask),
        logits.shape[1],
        logits.stride(0),
        bitmask.stride(0),
    )
