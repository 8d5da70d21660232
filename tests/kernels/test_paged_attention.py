"""paged_attention against the formula in float64, one row at a time.

Where no row has a key, in blocks that nobody owns and behind the context in the last one, there is no number in the
pool for Triton. Plain torch reads such places and gives them no weight, so for it there is just a large one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_checks import DTYPES, TRITON, assert_near, attention, bounds, only_triton, randn, skip_plain_torch
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels


@dataclass(frozen=True)
class Pool:
    """The middle layer of three. keys[r], values[r]: of row r, [context, num_kv_heads, head_dim]."""

    key_cache: Tensor
    value_cache: Tensor
    tables: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def make_pool(
    contexts: list[int], num_kv_heads: int, head_dim: int, *, block_size: int = 3, dtype: torch.dtype = torch.float32
) -> Pool:
    max_blocks = max(-(-context // block_size) for context in contexts) + 1
    num_blocks = len(contexts) * max_blocks + 3
    pool = torch.full((num_blocks, 3, 2, block_size, num_kv_heads, head_dim), torch.nan if TRITON else 1e3, dtype=dtype)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3))
    tables = order[: len(contexts) * max_blocks].view(-1, max_blocks)
    keys, values = [], []
    for row, context in enumerate(contexts):
        keys.append(randn(context, num_kv_heads, head_dim, seed=row, dtype=dtype))
        values.append(randn(context, num_kv_heads, head_dim, seed=100 + row, dtype=dtype))
        blocks, places = tables[row, torch.arange(context) // block_size], torch.arange(context) % block_size
        pool[blocks, 1, 0, places], pool[blocks, 1, 1, places] = keys[row], values[row]
    return Pool(pool[:, 1, 0], pool[:, 1, 1], tables.int(), keys, values)


def run(
    kernels: Kernels,
    pool: Pool,
    query: Tensor,
    query_lens: list[int],
    contexts: list[int],
    *,
    soft_cap: float | None = None,
    **options: Any,
) -> Tensor:
    plan = kernels.plan_paged_attention(
        pool.tables, torch.tensor(contexts), bounds(query_lens), block_size=pool.key_cache.shape[1], **options
    )
    return kernels.paged_attention(query, pool.key_cache, pool.value_cache, plan, scale=0.3, soft_cap=soft_cap)


def expected(pool: Pool, query: Tensor, query_lens: list[int], **options: Any) -> Tensor:
    parts = zip(query.split(query_lens), pool.keys, pool.values, strict=True)
    return torch.cat([attention(q, k, v, 0.3, **options) for q, k, v in parts])


@pytest.mark.parametrize(
    ("query_lens", "contexts"),
    [
        ([1], [1]),
        ([1, 1, 1], [4, 9, 2]),
        ([6], [6]),
        ([1, 1, 3, 35], [2, 7, 11, 40]),
        ([2, 1, 1], [2, 6, 10]),
        ([1, 0, 2], [5, 3, 4]),
    ],
)
@pytest.mark.parametrize("kind", ["causal", "window", "bias", "bias and window", "cross", "cap"])
def test_rows_of_all_kinds(kernels: Kernels, query_lens: list[int], contexts: list[int], kind: str) -> None:
    num_heads, num_kv_heads, head_dim = (3, 3, 8) if "bias" in kind else (6, 2, 5)
    pool = make_pool(contexts, num_kv_heads, head_dim)
    query = randn(sum(query_lens), num_heads, head_dim)
    options: dict[str, Any] = {
        "causal": kind != "cross",
        "window": 4 if "window" in kind else None,
        "bias_table": randn(num_heads, 7) if "bias" in kind else None,
        "soft_cap": 0.7 if kind == "cap" else None,
    }
    output = run(kernels, pool, query, query_lens, contexts, **options)
    assert_near(output, expected(pool, query, query_lens, **options), factor=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(2, 2, 64, 16), (8, 2, 80, 16), (5, 1, 96, 8), (18, 1, 128, 32), (71, 1, 16, 16)],
)
def test_shapes_of_models(
    kernels: Kernels, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    query_lens, contexts = [1, 1, 5], [20, 33, 37]
    pool = make_pool(contexts, num_kv_heads, head_dim, block_size=block_size, dtype=dtype)
    wide = randn(sum(query_lens), num_heads + 2, head_dim, dtype=dtype)
    query = wide[:, 1:-1]  # a slice of a wider projection
    output = run(kernels, pool, query, query_lens, contexts, causal=True)
    assert output.dtype == dtype
    assert_near(output, expected(pool, query, query_lens, causal=True), factor=2.0)


@pytest.mark.parametrize("window", [None, 300])
def test_long_contexts_are_cut_into_pieces(kernels: Kernels, window: int | None) -> None:
    """256 keys are one piece, 257 are two; 8300 are more than 32 pieces of 256 hold, so that theirs are longer."""
    contexts = [256, 257, 700, 8300]
    pool = make_pool(contexts, 1, 8, block_size=16)
    query = randn(len(contexts), 2, 8)
    output = run(kernels, pool, query, [1] * len(contexts), contexts, causal=True, window=window)
    assert_near(output, expected(pool, query, [1] * len(contexts), causal=True, window=window), factor=2.0)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("widths", [[4, 4], [4, 1, 1, 2, 2], [20, 3]])
def test_rows_with_the_same_keys(kernels: Kernels, widths: list[int], num_heads: int, num_kv_heads: int) -> None:
    """Beams of a request: they may share the reading of keys, whatever lies in the columns past the context."""
    lens = [3 + 2 * group for group in range(len(widths))]
    group_of = [group for group, width in enumerate(widths) for _ in range(width)]
    pool = make_pool(lens, num_kv_heads, 5)
    tables = pool.tables[group_of].clone()
    for row, group in enumerate(group_of):
        tables[row, -(-lens[group] // 3) :] = row % 5
    pool = Pool(
        pool.key_cache,
        pool.value_cache,
        tables,
        [pool.keys[group] for group in group_of],
        [pool.values[group] for group in group_of],
    )
    query, contexts = randn(sum(widths), num_heads, 5), [lens[group] for group in group_of]
    output = run(kernels, pool, query, [1] * sum(widths), contexts, causal=False)
    assert_near(output, expected(pool, query, [1] * sum(widths), causal=False), factor=2.0)


def test_more_queries_than_keys(kernels: Kernels) -> None:
    pool, query = make_pool([2], 2, 4), randn(7, 2, 4)
    output = run(kernels, pool, query, [7], [2], causal=False)
    assert_near(output, expected(pool, query, [7], causal=False), factor=2.0)


@only_triton
def test_a_row_without_keys_fills_up_a_batch_with_zeros(kernels: Kernels) -> None:
    pool, query = make_pool([5, 1], 2, 8), randn(2, 4, 8)
    output = run(kernels, pool, query, [1, 1], [5, 0], causal=True)
    assert_near(output[:1], expected(pool, query, [1, 1], causal=True)[:1], factor=2.0)
    assert (output[1] == 0).all()


def test_a_row_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    """Bit for bit, for one query and for several, with few keys and with pieces, whatever else there is."""
    skip_plain_torch(kernels)
    query_lens, contexts = [1, 1, 1, 4, 70], [5, 300, 40, 20, 80]
    pool = make_pool(contexts, 1, 8, block_size=16)
    query = randn(sum(query_lens), 2, 8)
    together = run(kernels, pool, query, query_lens, contexts, causal=True).split(query_lens)
    for row, part in enumerate(query.split(query_lens)):
        alone = Pool(pool.key_cache, pool.value_cache, pool.tables[row : row + 1], [], [])
        assert torch.equal(run(kernels, alone, part, [query_lens[row]], [contexts[row]], causal=True), together[row]), (
            f"row {row}"
        )


@pytest.mark.skipif(TRITON, reason="how a prompt is cut may change the last bits there")
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"bias_table": randn(6, 25)}], ids=["plain", "window", "bias"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_a_query_has_the_same_bits_however_its_prompt_is_cut(
    kernels: Kernels, options: dict[str, Any], num_kv_heads: int
) -> None:
    skip_plain_torch(kernels)
    length = 150
    pool, query = make_pool([length], num_kv_heads, 20, block_size=16), randn(length, 6, 20)
    whole = run(kernels, pool, query, [length], [length], causal=True, **options)
    for cut in (1, 7, 64, 100):
        ends = [*range(cut, length, cut), length]
        for start, end in pairwise([0, *ends]):
            part = run(kernels, pool, query[start:end], [end - start], [end], causal=True, **options)
            assert torch.equal(part, whole[start:end]), f"tokens {start} to {end}"


def test_rows_of_very_different_length_are_not_padded_to_the_longest() -> None:
    """Plain torch: a long row among short ones is attended to apart, with the same result."""
    contexts = [10] * 250 + [2000]
    key_cache, value_cache = (randn(700, 4, 1, 2, seed=seed) for seed in (1, 2))
    tables = torch.randint(0, 700, (251, 500), generator=torch.Generator().manual_seed(0))
    plan = reference.plan_paged_attention(tables, torch.tensor(contexts), torch.arange(252), block_size=4, causal=True)
    assert sum(len(batch.blocks) for batch in plan.batches) == 250 * 3 + 500
    query = randn(251, 1, 2)
    output = reference.paged_attention(query, key_cache, value_cache, plan, scale=1.0)
    for row in (0, 249, 250):
        keys, values = (cache[tables[row]].flatten(0, 1)[: contexts[row]] for cache in (key_cache, value_cache))
        assert_near(output[row : row + 1], attention(query[row : row + 1], keys, values, 1.0, causal=True))


def test_beams_read_their_keys_once() -> None:
    """Plain torch: rows on end with the same blocks are one batch of queries."""
    tables = torch.tensor([[1, 2, 9], [1, 2, 8], [3, 4, 9], [3, 4, 7], [5, 6, 1]])
    plan = reference.plan_paged_attention(
        tables, torch.tensor([6, 6, 6, 6, 6]), torch.arange(6), block_size=3, causal=False
    )
    assert sum((batch.end - batch.start) // batch.num_sharing for batch in plan.batches) == 3
