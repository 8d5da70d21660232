"""`logit_bias` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import ceil_div

_TILE = 128


def add_logit_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, biases: Tensor) -> None:
    if len(rows):
        _add_logit_bias_kernel[(ceil_div(len(rows), _TILE),)](
            logits,
            rows,
            token_ids,
            biases,
            len(rows),
            logits.stride(0),
            VOCAB_SIZE=logits.shape[1],
            TILE=_TILE,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["num_biases"])
def _add_logit_bias_kernel(
    logits_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    biases_ptr: tl.tensor,
    num_biases: tl.tensor,
    logits_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_place = places < num_biases
    rows = tl.load(rows_ptr + places, mask=is_place, other=-1).to(tl.int64)
    token_ids = tl.load(token_ids_ptr + places, mask=is_place, other=0).to(tl.int64)
    mask = (rows >= 0) & (token_ids < VOCAB_SIZE)
    biases = tl.load(biases_ptr + places, mask=mask, other=0.0)
    logits_ptrs = logits_ptr + rows * logits_stride + token_ids
    logits = tl.load(logits_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(logits_ptrs, logits + biases, mask=mask)
