"""A grammar for every row of a decode step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_kernels.case import Case, Inputs, after, num_bytes
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    num_rows, vocab_size = (64, 128256) if full else (3, 1100)
    logits = inputs.normal(num_rows, vocab_size, dtype=torch.float32)
    bitmask = inputs.below(2**31 - 1, num_rows, -(-vocab_size // 32), dtype=torch.int32)
    rows = inputs.different(num_rows, num_rows)

    def expected() -> Tensor:
        wanted = logits.double()
        reference.apply_token_bitmask(wanted, bitmask, rows)
        return wanted

    yield Case(
        f"{num_rows} x {vocab_size}",
        after(lambda: kernels.apply_token_bitmask(logits, bitmask, rows), logits),
        expected,
        num_bytes(bitmask) + num_bytes(logits) // 2,
        lambda: reference.apply_token_bitmask(logits, bitmask, rows),
        tolerance=0.0,
    )
