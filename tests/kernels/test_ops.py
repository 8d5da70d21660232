"""Each op against the formula in its contract, written out in the plainest way, on odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trivium_kernels.add_lora import LoraExpand, LoraWeights
from trivium_kernels.dispatch import Kernels

BLOCK_SIZE = 3
NUM_BLOCKS = 40


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    causal: bool,
    window: int | None = None,
    bias_table: Tensor | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """One sequence, one query and one head at a time; the last query stands at the last key."""
    output = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    for i in range(len(query)):
        position = len(key) - len(query) + i
        first = 0 if window is None else max(0, position - window + 1)
        last = position + 1 if causal else len(key)
        for head in range(query.shape[1]):
            scores = []
            for j in range(first, last):
                score = scale * (query[i, head] @ key[j, head // group])
                if soft_cap is not None:
                    score = soft_cap * (score / soft_cap).tanh()
                if bias_table is not None:
                    limit = bias_table.shape[1] // 2
                    score = score + bias_table[head, max(-limit, min(limit, j - position)) + limit]
                scores.append(score)
            weights = torch.stack(scores).softmax(0)
            output[i, head] = sum(w * value[j, head // group] for w, j in zip(weights, range(first, last), strict=True))
    return output


def bounds(lens: list[int]) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0)


def make_cache(num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Key and value views of the middle layer of a pool of three."""
    pool = randn(NUM_BLOCKS, 3, 2, BLOCK_SIZE, num_kv_heads, head_dim, seed=9)
    return pool[:, 1, 0], pool[:, 1, 1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (6, 2)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_varlen_attention(kernels: Kernels, causal: bool, num_heads: int, num_kv_heads: int, has_bias: bool) -> None:
    lens, head_dim = [5, 1, 8], 7
    query, bias_table = randn(14, num_heads, head_dim), randn(num_heads, 9) if has_bias else None
    key, value = randn(14, num_kv_heads, head_dim, seed=1), randn(14, num_kv_heads, head_dim, seed=2)
    plan = kernels.plan_varlen_attention(bounds(lens), causal=causal, bias_table=bias_table)
    output = kernels.varlen_attention(query, key, value, plan, scale=0.4)
    expected = [
        plain_attention(q, k, v, 0.4, causal=causal, bias_table=bias_table)
        for q, k, v in zip(query.split(lens), key.split(lens), value.split(lens), strict=True)
    ]
    torch.testing.assert_close(output, torch.cat(expected))


@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ([1], [1]),
        ([1, 1, 1], [4, 9, 2]),
        ([6], [6]),
        ([1, 1, 3, 5], [2, 7, 11, 5]),
        ([2, 1, 1], [2, 6, 10]),
    ],
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("kind", ["causal", "window", "bias", "bias and window", "cross"])
@pytest.mark.parametrize("soft_cap", [None, 0.7])
def test_paged_attention(
    kernels: Kernels,
    query_lens: list[int],
    context_lens: list[int],
    num_heads: int,
    num_kv_heads: int,
    kind: str,
    soft_cap: float | None,
) -> None:
    head_dim = 5
    key_cache, value_cache = make_cache(num_kv_heads, head_dim)
    max_blocks = -(-max(context_lens) // BLOCK_SIZE) + 1
    generator = torch.Generator().manual_seed(3)
    tables = torch.randperm(NUM_BLOCKS, generator=generator)[: len(context_lens) * max_blocks].view(-1, max_blocks)
    query = randn(sum(query_lens), num_heads, head_dim)
    options = {
        "causal": kind != "cross",
        "window": 4 if "window" in kind else None,
        "bias_table": randn(num_heads, 7) if "bias" in kind else None,
    }
    plan = kernels.plan_paged_attention(
        tables.int(), torch.tensor(context_lens), bounds(query_lens), block_size=BLOCK_SIZE, **options
    )
    output = kernels.paged_attention(query, key_cache, value_cache, plan, scale=0.6, soft_cap=soft_cap)
    expected = []
    for row, part in enumerate(query.split(query_lens)):
        keys, values = (cache[tables[row]].flatten(0, 1)[: context_lens[row]] for cache in (key_cache, value_cache))
        expected.append(plain_attention(part, keys, values, 0.6, soft_cap=soft_cap, **options))
    torch.testing.assert_close(output, torch.cat(expected))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("widths", [[4, 4], [4, 1, 1, 2, 2], [1, 3]])
def test_rows_with_the_same_keys_share_them(
    kernels: Kernels, widths: list[int], num_heads: int, num_kv_heads: int
) -> None:
    """Beams of a request: their blocks are read once, whatever lies in the columns past the context."""
    key_cache, value_cache = make_cache(num_kv_heads, 5)
    lens = [3 + 2 * group for group in range(len(widths))]
    num_rows, max_blocks = sum(widths), -(-max(lens) // BLOCK_SIZE) + 1
    tables = torch.randint(0, NUM_BLOCKS, (num_rows, max_blocks), generator=torch.Generator().manual_seed(1))
    group_of = [group for group, width in enumerate(widths) for _ in range(width)]
    for row, group in enumerate(group_of):
        num_blocks = -(-lens[group] // BLOCK_SIZE)
        tables[row, :num_blocks] = tables[group_of.index(group), :num_blocks]
    contexts = torch.tensor([lens[group] for group in group_of])
    query = randn(num_rows, num_heads, 5)
    plan = kernels.plan_paged_attention(
        tables.int(), contexts, torch.arange(num_rows + 1), block_size=BLOCK_SIZE, causal=False
    )
    assert sum((batch.end - batch.start) // batch.num_sharing for batch in plan.batches) == len(widths)
    output = kernels.paged_attention(query, key_cache, value_cache, plan, scale=0.6)
    for row in range(num_rows):
        keys, values = (cache[tables[row]].flatten(0, 1)[: contexts[row]] for cache in (key_cache, value_cache))
        expected = plain_attention(query[row : row + 1], keys, values, 0.6, causal=False)
        torch.testing.assert_close(output[row : row + 1], expected)


def test_cross_attention_may_have_fewer_keys_than_queries(kernels: Kernels) -> None:
    key_cache, value_cache = make_cache(2, 4)
    query = randn(7, 2, 4)
    plan = kernels.plan_paged_attention(
        torch.tensor([[5]]), torch.tensor([2]), bounds([7]), block_size=BLOCK_SIZE, causal=False
    )
    output = kernels.paged_attention(query, key_cache, value_cache, plan, scale=1.0)
    expected = plain_attention(query, key_cache[5, :2], value_cache[5, :2], 1.0, causal=False)
    torch.testing.assert_close(output, expected)


def test_rows_of_very_different_length_are_not_padded_to_the_longest(kernels: Kernels) -> None:
    """A long row among short ones is attended to apart, with the same result."""
    context_lens = [10] * 250 + [2000]
    key_cache, value_cache = (randn(700, 4, 1, 2, seed=seed) for seed in (1, 2))
    tables = torch.randint(0, 700, (251, 500), generator=torch.Generator().manual_seed(0))
    plan = kernels.plan_paged_attention(
        tables, torch.tensor(context_lens), torch.arange(252), block_size=4, causal=True
    )
    assert sum(len(batch.blocks) for batch in plan.batches) == 250 * 3 + 500
    query = randn(251, 1, 2)
    output = kernels.paged_attention(query, key_cache, value_cache, plan, scale=1.0)
    for row in (0, 249, 250):
        keys, values = (cache[tables[row]].flatten(0, 1)[: context_lens[row]] for cache in (key_cache, value_cache))
        expected = plain_attention(query[row : row + 1], keys, values, 1.0, causal=True)
        torch.testing.assert_close(output[row : row + 1], expected)


@pytest.mark.parametrize("groups", [((0, 3, 4), (2,)), (None,), ((5,), (0, 1, 2, 3, 4)), ()])
def test_add_lora(kernels: Kernels, groups: tuple[tuple[int, ...] | None, ...]) -> None:
    y, x = randn(6, 11), randn(6, 5)
    weights = [
        LoraWeights(randn(5, 5), (LoraExpand(0, 0, randn(4, 3)), LoraExpand(7, 3, randn(3, 2)))),
        LoraWeights(randn(1, 5, seed=1), (LoraExpand(4, 0, randn(7, 1)),)),
    ][: len(groups)]
    expected = y.clone()
    for rows, adapter in zip(groups, weights, strict=True):
        for row in range(6) if rows is None else rows:
            for part in adapter.expand:
                width, rank = part.matrix.shape
                shrunk = adapter.shrink[part.first_rank : part.first_rank + rank] @ x[row]
                expected[row, part.start : part.start + width] += part.matrix @ shrunk
    indexed = [None if rows is None else torch.tensor(rows) for rows in groups]
    kernels.add_lora(y, x, list(zip(indexed, weights, strict=True)))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
