"""`sample_tokens` in Triton, without sorting.

Weights are summed as integers, in units of 2^-40 of the largest one, so that no sum depends on its order. The rows go
through five kernels; the first two and the fourth work on tiles of the vocabulary:

1. the largest logit of each tile;
2. how many weights of each tile are at least 2^-2, 2^-4, ... 2^-14 of the largest one, and their sums;
3. per row: greedy rows are done; rows without limits find the tile that their random number falls into; the others
   find the largest of those powers that leaves enough tokens for top_k, or enough of the sum for top_p;
4. the tokens that are left are written side by side, with their weights;
5. per row: the smallest weight that top_k keeps, the smallest one that top_p keeps and the weight of the drawn token
   are found by bisection of the bits of a float among what is left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trivium_kernels.gpu.draw import draw_among, share, uniform_of_row, units
from trivium_kernels.gpu.launch import ceil_div, power_of_two
from trivium_kernels.sample_tokens import TokenSampling

_TILE = 1024  # the count of a tile and the sum of its weights fit into 64 bits together
_CANDIDATES = 2048  # of a step of the searches
_CUTOFFS = tl.constexpr(8)
_COUNT_SHIFT = tl.constexpr(52)  # a sum of 1024 weights has 51 bits
_GREEDY, _IN_TILE, _AMONG_CANDIDATES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def sample_tokens(logits: Tensor, sampling: TokenSampling) -> Tensor:
    num_rows, vocab_size = logits.shape
    num_tiles, device = ceil_div(vocab_size, _TILE), logits.device
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return token_ids
    maxima = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=device)
    places = torch.empty((num_rows, num_tiles), dtype=torch.int32, device=device)
    counts = torch.empty((num_rows, num_tiles, _CUTOFFS.value), dtype=torch.int64, device=device)
    starts = torch.empty((num_rows, num_tiles), dtype=torch.int32, device=device)
    paths = torch.empty((num_rows, 4), dtype=torch.int64, device=device)
    candidates = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=device)
    candidate_ids = torch.empty((num_rows, vocab_size), dtype=torch.int32, device=device)
    sizes = {"VOCAB_SIZE": vocab_size, "TILE": _TILE, "NUM_TILES": num_tiles, "TILES": power_of_two(num_tiles)}
    grid = (num_rows, num_tiles)
    _tile_maxima_kernel[grid](
        logits, maxima, places, logits.stride(0), VOCAB_SIZE=vocab_size, TILE=_TILE, NUM_TILES=num_tiles, num_warps=4
    )
    _tile_counts_kernel[grid](
        logits, maxima, sampling.temperature, sampling.min_p, counts, logits.stride(0), **sizes, num_warps=8
    )
    _paths_kernel[(num_rows,)](
        maxima,
        places,
        counts,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.seed,
        sampling.choice_index,
        sampling.position,
        token_ids,
        starts,
        paths,
        **sizes,
        num_warps=4,
    )
    _gather_kernel[grid](
        logits,
        maxima,
        sampling.temperature,
        sampling.min_p,
        starts,
        paths,
        candidates,
        candidate_ids,
        logits.stride(0),
        **sizes,
        num_warps=4,
    )
    _draw_kernel[(num_rows,)](
        logits,
        maxima,
        sampling.temperature,
        sampling.min_p,
        sampling.top_k,
        sampling.top_p,
        sampling.seed,
        sampling.choice_index,
        sampling.position,
        paths,
        candidates,
        candidate_ids,
        token_ids,
        logits.stride(0),
        **sizes,
        CANDIDATES=_CANDIDATES,
        num_warps=8,
    )
    return token_ids


@triton.jit
def _row_weights(
    logits_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    tokens: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES: tl.constexpr,
) -> tl.tensor:
    """exp((logit - max) / temperature) of `tokens` of a row, and 0 below min_p; maxima_ptr: of its tiles."""
    tiles = tl.arange(0, TILES)
    largest = tl.max(tl.load(maxima_ptr + tiles, mask=tiles < NUM_TILES, other=float("-inf")), axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    logits = tl.load(logits_ptr + tokens, mask=tokens < VOCAB_SIZE, other=float("-inf")).to(tl.float32)
    # Rounded divisions keep the order of logits, so that no weight is above 1; plain ones are only nearly right.
    weights = tl.exp(tl.div_rn(logits, temperature) - tl.div_rn(base, temperature))
    return tl.where(weights < min_p, 0.0, weights)


@triton.jit
def _cutoff(index: tl.tensor) -> tl.tensor:
    """2^-2, 2^-4, ..., 2^-14, 0."""
    return tl.where(index < _CUTOFFS - 1, tl.exp2(-2.0 * (index + 1).to(tl.float32)), 0.0)


@triton.jit
def _tile_maxima_kernel(
    logits_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    places_ptr: tl.tensor,
    logits_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
) -> None:
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = tile * TILE + tl.arange(0, TILE)
    logits = tl.load(logits_ptr + row * logits_stride + tokens, mask=tokens < VOCAB_SIZE, other=float("-inf"))
    logits = logits.to(tl.float32)
    largest = tl.max(logits, axis=0)
    first = tl.min(tl.where(logits == largest, tokens, VOCAB_SIZE), axis=0)
    tl.store(maxima_ptr + row * NUM_TILES + tile, largest)
    tl.store(places_ptr + row * NUM_TILES + tile, first)


@triton.jit
def _tile_counts_kernel(
    logits_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    logits_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Number of weights and their sum, in one integer, for each cutoff."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0.0:
        tokens = tile * TILE + tl.arange(0, TILE)
        weights = _row_weights(
            logits_ptr + row * logits_stride,
            maxima_ptr + row * NUM_TILES,
            temperature,
            tl.load(min_p_ptr + row),
            tokens,
            VOCAB_SIZE,
            NUM_TILES,
            TILES,
        )
        ones = tl.where(tokens < VOCAB_SIZE, 1, 0).to(tl.int64)
        values = units(weights) + (ones << _COUNT_SHIFT)
        cutoffs = tl.arange(0, _CUTOFFS)
        is_above = weights[:, None] >= _cutoff(cutoffs)[None, :]
        sums = tl.sum(tl.where(is_above, values[:, None], 0), axis=0)
        tl.store(counts_ptr + (row * NUM_TILES + tile) * _CUTOFFS + cutoffs, sums)


@triton.jit
def _paths_kernel(
    maxima_ptr: tl.tensor,
    places_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    choice_index_ptr: tl.tensor,
    position_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    paths_ptr: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """How a row goes on: (_GREEDY), (_IN_TILE, tile, what is left of the target there), or
    (_AMONG_CANDIDATES, cutoff, number of candidates, sum of all weights), with the place of each tile's first candidate
    in `starts`.

    token_ids get the largest logit, which stands where nothing better is found.
    """
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    is_tile = tiles < NUM_TILES
    maxima = tl.load(maxima_ptr + row * NUM_TILES + tiles, mask=is_tile, other=float("-inf"))
    places = tl.load(places_ptr + row * NUM_TILES + tiles, mask=is_tile, other=VOCAB_SIZE)
    best = tl.min(tl.where(maxima == tl.max(maxima, axis=0), places, VOCAB_SIZE - 1), axis=0)
    tl.store(token_ids_ptr + row, best.to(tl.int64))
    tl.store(paths_ptr + row * 4, _GREEDY)
    if tl.load(temperature_ptr + row) > 0.0:
        cutoffs = tl.arange(0, _CUTOFFS)
        counts_ptrs = counts_ptr + (row * NUM_TILES + tiles[:, None]) * _CUTOFFS + cutoffs[None, :]
        packed = tl.load(counts_ptrs, mask=is_tile[:, None], other=0)  # [TILES, _CUTOFFS]
        numbers = packed >> _COUNT_SHIFT
        sums = packed - (numbers << _COUNT_SHIFT)
        top_k = tl.minimum(tl.load(top_k_ptr + row), VOCAB_SIZE)
        top_p = tl.load(top_p_ptr + row)
        if (top_k > 0) | (top_p < 1.0):
            total = tl.sum(tl.sum(tl.where(cutoffs[None, :] == _CUTOFFS - 1, sums, 0), axis=1), axis=0)
            limit = share(total, top_p)
            is_enough = tl.where(top_k > 0, tl.sum(numbers, axis=0) >= top_k, tl.sum(sums, axis=0) >= limit)
            chosen = tl.min(tl.where(is_enough, cutoffs, _CUTOFFS - 1), axis=0)
            of_tiles = tl.sum(tl.where(cutoffs[None, :] == chosen, numbers, 0), axis=1)  # [TILES]
            tl.store(
                starts_ptr + row * NUM_TILES + tiles,
                (tl.cumsum(of_tiles, axis=0) - of_tiles).to(tl.int32),
                mask=is_tile,
            )
            tl.store(paths_ptr + row * 4, _AMONG_CANDIDATES)
            tl.store(paths_ptr + row * 4 + 1, chosen.to(tl.int64))
            tl.store(paths_ptr + row * 4 + 2, tl.sum(of_tiles, axis=0))
            tl.store(paths_ptr + row * 4 + 3, total)
        else:
            of_tiles = tl.sum(tl.where(cutoffs[None, :] == _CUTOFFS - 1, sums, 0), axis=1)
            uniform = uniform_of_row(row, seed_ptr, choice_index_ptr, position_ptr)
            target = (uniform * tl.sum(of_tiles, axis=0).to(tl.float64)).to(tl.int64)
            until = tl.cumsum(of_tiles, axis=0)
            tile = tl.min(tl.where(until > target, tiles, NUM_TILES - 1), axis=0)
            before = tl.sum(tl.where(tiles < tile, of_tiles, 0), axis=0)
            tl.store(paths_ptr + row * 4, _IN_TILE)
            tl.store(paths_ptr + row * 4 + 1, tile.to(tl.int64))
            tl.store(paths_ptr + row * 4 + 2, target - before)


@triton.jit
def _gather_kernel(
    logits_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    paths_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    candidate_ids_ptr: tl.tensor,
    logits_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(paths_ptr + row * 4) == _AMONG_CANDIDATES:
        tokens = tile * TILE + tl.arange(0, TILE)
        weights = _row_weights(
            logits_ptr + row * logits_stride,
            maxima_ptr + row * NUM_TILES,
            tl.load(temperature_ptr + row),
            tl.load(min_p_ptr + row),
            tokens,
            VOCAB_SIZE,
            NUM_TILES,
            TILES,
        )
        is_kept = (weights >= _cutoff(tl.load(paths_ptr + row * 4 + 1))) & (tokens < VOCAB_SIZE)
        ranks = tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
        places = row * VOCAB_SIZE + tl.load(starts_ptr + row * NUM_TILES + tile) + ranks
        tl.store(candidates_ptr + places, weights, mask=is_kept)
        tl.store(candidate_ids_ptr + places, tokens, mask=is_kept)


@triton.jit
def _draw_kernel(
    logits_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    choice_index_ptr: tl.tensor,
    position_ptr: tl.tensor,
    paths_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    candidate_ids_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    logits_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    path = tl.load(paths_ptr + row * 4)
    if path == _IN_TILE:
        tokens = tl.load(paths_ptr + row * 4 + 1).to(tl.int32) * TILE + tl.arange(0, TILE)
        weights = _row_weights(
            logits_ptr + row * logits_stride,
            maxima_ptr + row * NUM_TILES,
            tl.load(temperature_ptr + row),
            tl.load(min_p_ptr + row),
            tokens,
            VOCAB_SIZE,
            NUM_TILES,
            TILES,
        )
        until = tl.cumsum(units(weights), axis=0)
        token = tl.min(tl.where(until > tl.load(paths_ptr + row * 4 + 2), tokens, VOCAB_SIZE), axis=0)
        tl.store(token_ids_ptr + row, token.to(tl.int64), mask=token < VOCAB_SIZE)
    if path == _AMONG_CANDIDATES:
        token = draw_among(
            candidates_ptr + row * VOCAB_SIZE,
            candidate_ids_ptr + row * VOCAB_SIZE,
            tl.load(paths_ptr + row * 4 + 2).to(tl.int32),
            tl.load(paths_ptr + row * 4 + 3),
            tl.minimum(tl.load(top_k_ptr + row), VOCAB_SIZE),
            tl.load(top_p_ptr + row),
            uniform_of_row(row, seed_ptr, choice_index_ptr, position_ptr),
            CANDIDATES,
        )
        tl.store(token_ids_ptr + row, token.to(tl.int64), mask=token >= 0)
