"""`penalties` in Triton. Counts are integers that atomic additions change, so their order does not matter."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import ceil_div
from trivium_kernels.penalties import Penalties, TokenCounts

_TOKENS = 128  # of a program that counts
_TILE = 1024


def count_tokens(counts: TokenCounts, slots: Tensor, token_ids: Tensor, *, of_output: bool) -> None:
    if len(slots):
        table = counts.in_output if of_output else counts.in_prompt
        _count_tokens_kernel[(ceil_div(len(slots), _TOKENS),)](
            table,
            slots,
            token_ids,
            len(slots),
            table.stride(0),
            VOCAB_SIZE=counts.in_output.shape[1],
            OF_OUTPUT=of_output,
            TOKENS=_TOKENS,
            num_warps=4,
        )


def apply_penalties(logits: Tensor, counts: TokenCounts, slots: Tensor, penalties: Penalties) -> None:
    num_rows, vocab_size = logits.shape
    if num_rows:
        _apply_penalties_kernel[(num_rows, ceil_div(vocab_size, _TILE))](
            logits,
            counts.in_prompt,
            counts.in_output,
            slots,
            penalties.repetition,
            penalties.frequency,
            penalties.presence,
            logits.stride(0),
            counts.in_prompt.stride(0),
            counts.in_output.stride(0),
            VOCAB_SIZE=vocab_size,
            TILE=_TILE,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["num_tokens"])
def _count_tokens_kernel(
    table_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    num_tokens: tl.tensor,
    table_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    OF_OUTPUT: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    places = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slots = tl.load(slots_ptr + places, mask=places < num_tokens, other=-1).to(tl.int64)
    token_ids = tl.load(token_ids_ptr + places, mask=places < num_tokens, other=-1).to(tl.int64)
    mask = (slots >= 0) & (token_ids >= 0) & (token_ids < VOCAB_SIZE)
    ones = tl.full([TOKENS], 1, tl.int32)
    if OF_OUTPUT:
        tl.atomic_add(table_ptr + slots * table_stride + token_ids, ones, mask=mask)
    else:
        bits = ones << (token_ids % 32).to(tl.int32)
        tl.atomic_or(table_ptr + slots * table_stride + token_ids // 32, bits, mask=mask)


@triton.jit
def _apply_penalties_kernel(
    logits_ptr: tl.tensor,
    in_prompt_ptr: tl.tensor,
    in_output_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    frequency_ptr: tl.tensor,
    presence_ptr: tl.tensor,
    logits_stride: tl.tensor,
    in_prompt_stride: tl.tensor,
    in_output_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    repetition = tl.load(repetition_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    presence = tl.load(presence_ptr + row)
    if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
        slot = tl.load(slots_ptr + row).to(tl.int64)
        tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
        mask = tokens < VOCAB_SIZE
        count = tl.load(in_output_ptr + slot * in_output_stride + tokens, mask=mask, other=0)
        words = tl.load(in_prompt_ptr + slot * in_prompt_stride + tokens // 32, mask=mask, other=0)
        is_known = (count > 0) | (((words >> (tokens % 32)) & 1) != 0)
        mask = mask & is_known
        logits_ptrs = logits_ptr + row * logits_stride + tokens
        logits = tl.load(logits_ptrs, mask=mask, other=0.0).to(tl.float32)
        logits = tl.where(logits < 0, logits * repetition, tl.div_rn(logits, repetition))
        logits -= frequency * count.to(tl.float32)
        logits -= tl.where(count > 0, presence, 0.0)
        tl.store(logits_ptrs, logits, mask=mask)
