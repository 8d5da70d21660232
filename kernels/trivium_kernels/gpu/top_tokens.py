"""The largest logits of rows and the norm of their softmax, in one pass over the vocabulary.

Every tile finds its own largest numbers; a second kernel finds those of the row among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.launch import ceil_div, power_of_two

MAX_TOP = 256  # more of them are faster found by torch.topk
_TILE = 2048


@dataclass(frozen=True, slots=True)
class TopTokens:
    """values float32 and token_ids int64 [num_rows, num_top]: log-probabilities, or logits where those were wanted.

    They fall; equal ones are in the order of the vocabulary. norms: [num_rows] float32, the logarithm of the sum of
    exp(logits). logprobs float32, ranks int64 [num_rows]: of the tokens asked for.
    """

    values: Tensor
    token_ids: Tensor
    norms: Tensor
    logprobs: Tensor | None
    ranks: Tensor | None


def top_tokens(logits: Tensor, num_top: int, *, token_ids: Tensor | None = None, normalize: bool = True) -> TopTokens:
    """logits [num_rows, vocab_size]; num_top at most MAX_TOP. token_ids: one per row whose place is asked for.

    Places behind the vocabulary, where that is smaller than num_top, have the value -inf and the id vocab_size.
    """
    num_rows, vocab_size = logits.shape
    num_tiles, device = ceil_div(vocab_size, _TILE), logits.device
    tile_norms = torch.empty((num_rows, num_tiles, 2), dtype=torch.float32, device=device)
    larger = torch.empty((num_rows, num_tiles), dtype=torch.int32, device=device)
    tile_values = torch.empty((num_rows, num_tiles, num_top), dtype=torch.float32, device=device)
    tile_ids = torch.empty((num_rows, num_tiles, num_top), dtype=torch.int32, device=device)
    values = torch.empty((num_rows, num_top), dtype=torch.float32, device=device)
    ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=device)
    norms = torch.empty(num_rows, dtype=torch.float32, device=device)
    logprobs = None if token_ids is None else torch.empty(num_rows, dtype=torch.float32, device=device)
    ranks = None if token_ids is None else torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows:
        sizes = {"VOCAB_SIZE": vocab_size, "NUM_TILES": num_tiles}
        _tile_top_kernel[(num_rows, num_tiles)](
            logits,
            token_ids,
            tile_norms,
            larger,
            tile_values,
            tile_ids,
            logits.stride(0),
            num_top,
            **sizes,
            TILE=_TILE,
            num_warps=4,
        )
        candidates = power_of_two(max(num_tiles * num_top, 2))
        _row_top_kernel[(num_rows,)](
            logits,
            token_ids,
            tile_norms,
            larger,
            tile_values,
            tile_ids,
            values,
            ids,
            norms,
            logprobs,
            ranks,
            logits.stride(0),
            num_top,
            **sizes,
            TILES=power_of_two(num_tiles),
            CANDIDATES=candidates,
            NORMALIZE=normalize,
            num_warps=4 if candidates <= 2048 else 8,
        )
    return TopTokens(values, ids, norms, logprobs, ranks)


@triton.jit(do_not_specialize=["num_top"])
def _tile_top_kernel(
    logits_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    tile_norms_ptr: tl.tensor,
    larger_ptr: tl.tensor,
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    logits_stride: tl.tensor,
    num_top: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """tile_norms: largest logit and sum of exp(logit - largest); larger: how many are above that of the row's token."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = tile * TILE + tl.arange(0, TILE)
    is_left = tokens < VOCAB_SIZE
    logits_ptr += row * logits_stride
    logits = tl.load(logits_ptr + tokens, mask=is_left, other=float("-inf")).to(tl.float32)
    place = row * NUM_TILES + tile
    largest = tl.max(logits, axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(tile_norms_ptr + place * 2, largest)
    tl.store(tile_norms_ptr + place * 2 + 1, tl.sum(tl.exp(logits - base), axis=0))
    if token_ids_ptr is not None:
        chosen = tl.load(logits_ptr + tl.load(token_ids_ptr + row)).to(tl.float32)
        tl.store(larger_ptr + place, tl.sum((logits > chosen).to(tl.int32), axis=0))
    for index in range(num_top):
        value = tl.max(tl.where(is_left, logits, float("-inf")), axis=0)
        token = tl.min(tl.where(is_left & (logits == value), tokens, VOCAB_SIZE), axis=0)
        tl.store(values_ptr + place * num_top + index, value)
        tl.store(ids_ptr + place * num_top + index, token)
        is_left = is_left & (tokens != token)


@triton.jit(do_not_specialize=["num_top"])
def _row_top_kernel(
    logits_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    tile_norms_ptr: tl.tensor,
    larger_ptr: tl.tensor,
    tile_values_ptr: tl.tensor,
    tile_ids_ptr: tl.tensor,
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    norms_ptr: tl.tensor,
    logprobs_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    logits_stride: tl.tensor,
    num_top: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    NORMALIZE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    tiles = row * NUM_TILES + tl.arange(0, TILES)
    is_tile = tl.arange(0, TILES) < NUM_TILES
    maxima = tl.load(tile_norms_ptr + tiles * 2, mask=is_tile, other=float("-inf"))
    sums = tl.load(tile_norms_ptr + tiles * 2 + 1, mask=is_tile, other=0.0)
    largest = tl.max(maxima, axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    log_sum = tl.log(tl.sum(sums * tl.exp(maxima - base), axis=0))
    tl.store(norms_ptr + row, base + log_sum)
    if token_ids_ptr is not None:
        chosen = tl.load(logits_ptr + row * logits_stride + tl.load(token_ids_ptr + row)).to(tl.float32)
        tl.store(logprobs_ptr + row, (chosen - base) - log_sum)
        larger = tl.sum(tl.load(larger_ptr + tiles, mask=is_tile, other=0), axis=0)
        tl.store(ranks_ptr + row, larger.to(tl.int64) + 1)
    places = tl.arange(0, CANDIDATES)
    is_left = places < NUM_TILES * num_top
    candidates = tl.load(tile_values_ptr + row * NUM_TILES * num_top + places, mask=is_left, other=float("-inf"))
    ids = tl.load(tile_ids_ptr + row * NUM_TILES * num_top + places, mask=is_left, other=VOCAB_SIZE)
    is_left = is_left & (ids < VOCAB_SIZE)
    for index in range(num_top):
        value = tl.max(tl.where(is_left, candidates, float("-inf")), axis=0)
        token = tl.min(tl.where(is_left & (candidates == value), ids, VOCAB_SIZE), axis=0)
        tl.store(values_ptr + row * num_top + index, (value - base) - log_sum if NORMALIZE else value)
        tl.store(ids_ptr + row * num_top + index, token.to(tl.int64))
        is_left = is_left & (ids != token)
