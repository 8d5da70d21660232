"""Each op against the formula in its contract, written out in the plainest way, on odd shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trivium_kernels.activation import Activation
from trivium_kernels.add_lora import LoraExpand, LoraWeights
from trivium_kernels.dispatch import Kernels, select_kernels

BLOCK_SIZE = 3
NUM_BLOCKS = 40


@pytest.fixture(params=["cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return select_kernels(torch.device(request.param))


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


def test_reshape_and_cache_writes_the_slots_and_nothing_else(kernels: Kernels) -> None:
    pool = torch.zeros(4, 3, 2, BLOCK_SIZE, 2, 5)
    key, value = randn(6, 7, 5)[:, 2:4], randn(6, 2, 5, seed=1)  # the key is a slice of a wider projection
    slots = torch.tensor([11, 0, 4, 3, 8, 7])
    kernels.reshape_and_cache(key, value, pool[:, 1, 0], pool[:, 1, 1], slots)
    expected = torch.zeros_like(pool)
    for row, slot in enumerate(slots.tolist()):
        expected[slot // BLOCK_SIZE, 1, 0, slot % BLOCK_SIZE] = key[row]
        expected[slot // BLOCK_SIZE, 1, 1, slot % BLOCK_SIZE] = value[row]
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("shape", [(1, 7), (5, 3, 9)])
def test_norms(kernels: Kernels, shape: tuple[int, ...]) -> None:
    x, weight, bias = randn(*shape), randn(shape[-1], seed=1), randn(shape[-1], seed=2)
    square = (x * x).mean(-1, keepdim=True)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-3), x / (square + 1e-3).sqrt() * weight)
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    expected = centred / (variance + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(kernels.layer_norm(x, weight, bias, 1e-3), expected)


def test_rotary_embedding_rotates_pairs_of_the_two_halves(kernels: Kernels) -> None:
    x, angles = randn(5, 3, 8), randn(5, 4)
    cos = torch.cat((angles.cos(), angles.cos()), -1)[:, None]
    sin = torch.cat((-angles.sin(), angles.sin()), -1)[:, None]
    rotated = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(kernels.rotary_embedding(x, cos, sin), torch.cat((rotated.real, rotated.imag), -1))


def test_partial_rotary_embedding_leaves_the_rest_of_a_head(kernels: Kernels) -> None:
    x, angles = randn(5, 3, 7), randn(5, 2)
    cos, sin = torch.cat((angles.cos(),) * 2, -1)[:, None], torch.cat((-angles.sin(), angles.sin()), -1)[:, None]
    rotated = kernels.rotary_embedding(x, cos, sin)
    torch.testing.assert_close(rotated[..., :4], kernels.rotary_embedding(x[..., :4].contiguous(), cos, sin))
    assert torch.equal(rotated[..., 4:], x[..., 4:])


_FORMULAS = {
    Activation.RELU: lambda x: max(x, 0.0),
    Activation.SILU: lambda x: x / (1 + math.exp(-x)),
    Activation.GELU: lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    Activation.GELU_TANH: lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    Activation.QUICK_GELU: lambda x: x / (1 + math.exp(-1.702 * x)),
    Activation.RELU2: lambda x: max(x, 0.0) ** 2,
    Activation.RELU6: lambda x: min(max(x, 0.0), 6.0),
    Activation.LEAKY_RELU: lambda x: x if x > 0 else 0.01 * x,
    Activation.HARDSWISH: lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
    Activation.MISH: lambda x: x * math.tanh(math.log1p(math.exp(x))),
    Activation.TANH: math.tanh,
    Activation.SIGMOID: lambda x: 1 / (1 + math.exp(-x)),
    Activation.LINEAR: lambda x: x,
}


@pytest.mark.parametrize("kind", list(Activation))
def test_activations(kernels: Kernels, kind: Activation) -> None:
    gate, up = 4 * randn(3, 5), randn(3, 5, seed=1)
    expected = torch.tensor([_FORMULAS[kind](value) for value in gate.flatten().tolist()]).view(3, 5)
    torch.testing.assert_close(kernels.gated_activate(torch.cat((gate, up), -1), kind), expected * up)
    torch.testing.assert_close(kernels.activate(gate.clone(), kind), expected)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100])
def test_token_bitmask_keeps_the_tokens_whose_bit_is_set(kernels: Kernels, vocab_size: int) -> None:
    logits = randn(5, vocab_size)
    rows = torch.tensor([3, 0, 4])
    allowed = randn(3, vocab_size, seed=1) > 0
    words = [[0] * -(-vocab_size // 32) for _ in rows]
    for row, token in allowed.nonzero().tolist():
        words[row][token // 32] |= 1 << token % 32
    signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in words]
    expected = logits.clone()
    for row, mask in zip(rows.tolist(), allowed, strict=True):
        expected[row, ~mask] = -torch.inf
    kernels.apply_token_bitmask(logits, torch.tensor(signed, dtype=torch.int32), rows)
    assert torch.equal(logits, expected)


def test_a_device_without_kernels_is_named() -> None:
    with pytest.raises(ValueError, match="no kernels for device 'meta'"):
        select_kernels(torch.device("meta"))


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
