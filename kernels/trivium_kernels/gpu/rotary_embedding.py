"""`rotary_embedding` in Triton, arithmetic in float32. A program rotates some heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import ceil_div, power_of_two

HEADS = 8  # of one program


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_tokens, num_heads, head_dim = x.shape
    if num_tokens:
        _rotary_embedding_kernel[(num_tokens, ceil_div(num_heads, HEADS))](
            x,
            cos,
            sin,
            y,
            x.stride(0),
            x.stride(1),
            cos.stride(0),
            sin.stride(0),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            HEADS=HEADS,
            **rotary_tiles(head_dim, cos.shape[-1]),
            num_warps=4,
        )
    return y


def rotary_tiles(head_dim: int, rotary_dim: int) -> dict[str, int]:
    """The parts of a head: two halves that are rotated, and a rest, each in a tile of its own."""
    rest = head_dim - rotary_dim
    return {
        "HALF": rotary_dim // 2,
        "HALF_TILE": power_of_two(rotary_dim // 2),
        "REST_TILE": power_of_two(rest) if rest else 0,
    }


@triton.jit
def rotated(
    first: tl.tensor, second: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, HALF: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The two halves [HEADS, TILE] of heads of one token, rotated by the angles at cos_ptr and sin_ptr."""
    columns = tl.arange(0, TILE)
    mask = columns < HALF
    cos_first = tl.load(cos_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + HALF + columns, mask=mask, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + HALF + columns, mask=mask, other=0.0).to(tl.float32)
    new_first = first * cos_first[None, :] + second * sin_first[None, :]
    new_second = second * cos_second[None, :] + first * sin_second[None, :]
    return new_first, new_second


@triton.jit
def _rotary_embedding_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    y_ptr: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = (heads < NUM_HEADS)[:, None]
    columns = tl.arange(0, HALF_TILE)[None, :]
    mask = is_head & (columns < HALF)
    x_ptrs = x_ptr + token * token_stride + heads[:, None] * head_stride + columns
    y_ptrs = y_ptr + (token * NUM_HEADS + heads[:, None]) * HEAD_DIM + columns
    first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    first, second = rotated(first, second, cos_ptr + token * cos_stride, sin_ptr + token * sin_stride, HALF, HALF_TILE)
    tl.store(y_ptrs, first, mask=mask)
    tl.store(y_ptrs + HALF, second, mask=mask)
    if REST_TILE > 0:
        rest = 2 * HALF + tl.arange(0, REST_TILE)[None, :]
        mask = is_head & (rest < HEAD_DIM)
        x = tl.load(x_ptr + token * token_stride + heads[:, None] * head_stride + rest, mask=mask, other=0.0)
        tl.store(y_ptr + (token * NUM_HEADS + heads[:, None]) * HEAD_DIM + rest, x, mask=mask)
