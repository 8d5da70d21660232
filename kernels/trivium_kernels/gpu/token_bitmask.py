"""`token_bitmask` in Triton: only what is not allowed is written, nothing of the logits is read."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import ceil_div

_TILE = 2048


def apply_token_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    vocab_size = logits.shape[1]
    if len(rows):
        _token_bitmask_kernel[(len(rows), ceil_div(vocab_size, _TILE))](
            logits,
            bitmask,
            rows,
            logits.stride(0),
            bitmask.stride(0),
            VOCAB_SIZE=vocab_size,
            TILE=_TILE,
            num_warps=4,
        )


@triton.jit
def _token_bitmask_kernel(
    logits_ptr: tl.tensor,
    bitmask_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    logits_stride: tl.tensor,
    bitmask_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_token = tokens < VOCAB_SIZE
    words = tl.load(bitmask_ptr + index * bitmask_stride + tokens // 32, mask=is_token, other=0)
    banned = ((words >> (tokens % 32)) & 1) == 0
    tl.store(logits_ptr + row * logits_stride + tokens, float("-inf"), mask=is_token & banned)
