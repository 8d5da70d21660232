"""Biases of a few hundred tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_kernels.case import Case, Inputs, after, num_bytes
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    num_rows, vocab_size, count = (64, 128256, 1024) if full else (3, 1100, 20)
    logits = inputs.normal(num_rows, vocab_size, dtype=torch.float32)
    pairs = inputs.different(count, num_rows * vocab_size)
    arguments = pairs // vocab_size, pairs % vocab_size, inputs.normal(count, dtype=torch.float32)

    def expected() -> Tensor:
        wanted = logits.double()
        reference.add_logit_bias(wanted, *arguments)
        return wanted

    yield Case(
        f"{count} biases of {num_rows} x {vocab_size}",
        after(lambda: kernels.add_logit_bias(logits, *arguments), logits),
        expected,
        num_bytes(*arguments) + 8 * count,
        lambda: reference.add_logit_bias(logits, *arguments),
        tolerance=1e-6,
    )
