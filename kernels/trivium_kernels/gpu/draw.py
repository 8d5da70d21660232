"""The draw of one token among candidates: random numbers, and thresholds found by bisection.

Weights are at most 1 and never negative, so their bits are in the order of the weights. They are summed as integers, in
units of 2^-40.
"""

from __future__ import annotations

import triton
import triton.language as tl

_UNIT = tl.constexpr(1099511627776.0)  # 2^40
_LARGEST = tl.constexpr(0x3F800000)  # the bits of 1.0


@triton.jit
def uniform_number(seed: tl.tensor, choice_index: tl.tensor, position: tl.tensor) -> tl.tensor:
    """float64 in (0, 1), of int64 keys."""
    state = _mix(seed.to(tl.uint64))
    state = _mix(state ^ choice_index.to(tl.uint64))
    state = _mix(state ^ position.to(tl.uint64))
    return ((state >> 16).to(tl.float64) + 0.5) * 3.552713678800501e-15  # 2^-48


@triton.jit
def _mix(state: tl.tensor) -> tl.tensor:
    state = state + 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def uniform_of_row(
    row: tl.tensor, seed_ptr: tl.tensor, choice_index_ptr: tl.tensor, position_ptr: tl.tensor
) -> tl.tensor:
    return uniform_number(tl.load(seed_ptr + row), tl.load(choice_index_ptr + row), tl.load(position_ptr + row))


@triton.jit
def units(weights: tl.tensor) -> tl.tensor:
    return (weights * _UNIT).to(tl.int64)


@triton.jit
def share(total: tl.tensor, top_p: tl.tensor) -> tl.tensor:
    """top_p of `total`, rounded up; all of it from 1 on."""
    exact = top_p.to(tl.float64) * total.to(tl.float64)
    whole = exact.to(tl.int64)
    return tl.where(top_p < 1.0, tl.where(whole.to(tl.float64) < exact, whole + 1, whole), total)


@triton.jit
def _above(
    candidates_ptr: tl.tensor,
    num_candidates: tl.tensor,
    least: tl.tensor,
    COUNT: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> tl.tensor:
    """How many candidates have weights of at least `least`, by its bits, or the sum of these weights."""
    result = tl.full([], 0, tl.int64)
    for start in range(0, num_candidates, CANDIDATES):
        places = start + tl.arange(0, CANDIDATES)
        weights = tl.load(candidates_ptr + places, mask=places < num_candidates, other=-1.0)
        is_above = (weights >= 0.0) & (weights.to(tl.int32, bitcast=True) >= least)
        if COUNT:
            result += tl.sum(is_above.to(tl.int64), axis=0)
        else:
            result += tl.sum(tl.where(is_above, units(weights), 0), axis=0)
    return result


@triton.jit
def _threshold(
    candidates_ptr: tl.tensor,
    num_candidates: tl.tensor,
    wanted: tl.tensor,
    low: tl.tensor,
    COUNT: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> tl.tensor:
    """The largest weight, by its bits, for which `_above` is at least `wanted`; it is known to be `low` or more."""
    high = tl.full([], _LARGEST, tl.int32)
    while low < high:
        middle = low + (high - low + 1) // 2
        found = tl.full([], 0, tl.int64)
        for start in range(0, num_candidates, CANDIDATES):  # `_above` itself, which the interpreter calls too slowly
            places = start + tl.arange(0, CANDIDATES)
            weights = tl.load(candidates_ptr + places, mask=places < num_candidates, other=-1.0)
            is_above = (weights >= 0.0) & (weights.to(tl.int32, bitcast=True) >= middle)
            values = is_above.to(tl.int64) if COUNT else tl.where(is_above, (weights * _UNIT).to(tl.int64), 0)
            found += tl.sum(values, axis=0)
        if found >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _units_of_bits(bits: tl.tensor) -> tl.tensor:
    return units(bits.to(tl.float32, bitcast=True))


@triton.jit
def draw_among(
    candidates_ptr: tl.tensor,
    candidate_ids_ptr: tl.tensor,
    num_candidates: tl.tensor,
    total: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    uniform: tl.tensor,
    CANDIDATES: tl.constexpr,
) -> tl.tensor:
    """The token that `uniform` falls on; total: the sum of all weights of the row, candidates or not."""
    least = tl.full([], 0, tl.int32)  # bits of the smallest weight that is kept
    if top_k > 0:
        least = _threshold(candidates_ptr, num_candidates, top_k, least, True, CANDIDATES)
        num_larger = _above(candidates_ptr, num_candidates, least + 1, True, CANDIDATES)
        larger = _above(candidates_ptr, num_candidates, least + 1, False, CANDIDATES)
        total = larger + (top_k - num_larger) * _units_of_bits(least)
    if top_p < 1.0:
        limit = share(total, top_p)
        least = _threshold(candidates_ptr, num_candidates, limit, least, False, CANDIDATES)
        larger = _above(candidates_ptr, num_candidates, least + 1, False, CANDIDATES)
        unit = tl.maximum(_units_of_bits(least), 1)
        num_equal = tl.maximum((limit - larger + unit - 1) // unit, 1)
        total = larger + num_equal * unit
    target = (uniform * total.to(tl.float64)).to(tl.int64)
    drawn = _threshold(candidates_ptr, num_candidates, target + 1, least, False, CANDIDATES)
    larger = _above(candidates_ptr, num_candidates, drawn + 1, False, CANDIDATES)
    rank = (target - larger) // tl.maximum(_units_of_bits(drawn), 1)  # among equal weights
    token = tl.full([], -1, tl.int32)
    num_passed = tl.full([], 0, tl.int64)
    for start in range(0, num_candidates, CANDIDATES):
        places = start + tl.arange(0, CANDIDATES)
        weights = tl.load(candidates_ptr + places, mask=places < num_candidates, other=-1.0)
        is_equal = weights.to(tl.int32, bitcast=True) == drawn
        ranks = num_passed + tl.cumsum(is_equal.to(tl.int64), axis=0) - 1
        is_drawn = is_equal & (ranks == rank)
        ids = tl.load(candidate_ids_ptr + places, mask=is_drawn, other=-1)
        token = tl.maximum(token, tl.max(ids, axis=0))
        num_passed += tl.sum(is_equal.to(tl.int64), axis=0)
    return token
