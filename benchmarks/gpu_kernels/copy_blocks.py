"""Copies of whole blocks of all layers: 12 beams of BART-large, and what a swap gathers of Llama 8B."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from gpu_kernels.case import Case, Inputs, after
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    for count, block in ((12, (12, 2, 16, 16, 64)), (64, (32, 2, 16, 8, 128))) if full else ((2, (2, 2, 3, 2, 8)),):
        yield _case(kernels, inputs, count, block)


def _case(kernels: Kernels, inputs: Inputs, count: int, block: tuple[int, ...]) -> Case:
    pool, blocks = inputs.normal(4 * count, *block), inputs.different(2 * count, 4 * count)
    from_blocks, to_blocks = blocks[:count], blocks[count:]

    def expected() -> Tensor:
        wanted = pool.clone()
        reference.copy_blocks(wanted, wanted, from_blocks, to_blocks)
        return wanted.double()

    return Case(
        f"{count} blocks of {pool[0].nbytes / 2**20:.2f} MiB",
        after(lambda: kernels.copy_blocks(pool, pool, from_blocks, to_blocks), pool),
        expected,
        2 * count * pool[0].nbytes,
        lambda: reference.copy_blocks(pool, pool, from_blocks, to_blocks),
        tolerance=0.0,
    )
