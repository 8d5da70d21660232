"""The write of keys and values into the pool, in a decode step and for a prompt."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from gpu_kernels.case import Case, Inputs, after, num_bytes
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    for num_tokens, num_kv_heads, head_dim in ((64, 8, 128), (4096, 8, 128)) if full else ((3, 2, 16),):
        yield _case(kernels, inputs, num_tokens, num_kv_heads, head_dim)


def _case(kernels: Kernels, inputs: Inputs, num_tokens: int, num_kv_heads: int, head_dim: int) -> Case:
    key, value = inputs.normal(2, num_tokens, num_kv_heads, head_dim)
    pool = inputs.normal(max(2, num_tokens // 8), 2, 2, 16, num_kv_heads, head_dim)
    slots = inputs.different(num_tokens, 16 * len(pool))

    def expected() -> Tensor:
        wanted = pool.double()
        reference.reshape_and_cache(key.double(), value.double(), wanted[:, 1, 0], wanted[:, 1, 1], slots)
        return wanted

    return Case(
        f"{num_tokens} tokens, {num_kv_heads} x {head_dim}",
        after(lambda: kernels.reshape_and_cache(key, value, pool[:, 1, 0], pool[:, 1, 1], slots), pool),
        expected,
        2 * num_bytes(key, value),
        lambda: reference.reshape_and_cache(key, value, pool[:, 1, 0], pool[:, 1, 1], slots),
        tolerance=0.0,
    )
