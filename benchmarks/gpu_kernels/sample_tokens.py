"""The draw of a decode step: greedy, from all tokens, and with limits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_kernels.case import Case, Inputs, num_bytes
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels
from trivium_kernels.sample_tokens import TokenSampling

LIMITS = {  # name -> temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top_k 50": (0.8, 50, 1.0, 0.0),
    "top_p 0.95": (0.8, 0, 0.95, 0.0),
    "top_k 50, top_p 0.95, min_p 0.01": (0.8, 50, 0.95, 0.01),
}


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    num_rows, vocab_size = (64, 128256) if full else (3, 1100)
    logits = 3 * inputs.normal(num_rows, vocab_size, dtype=torch.float32)
    for name, limits in LIMITS.items():
        yield _case(kernels, logits, name, _sampling(inputs, num_rows, limits))


def _sampling(inputs: Inputs, num_rows: int, limits: tuple[float, int, float, float]) -> TokenSampling:
    temperature, top_k, top_p, min_p = (torch.full((num_rows,), limit, device=inputs.device) for limit in limits)
    return TokenSampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=inputs.below(2**62, num_rows),
        choice_index=inputs.below(4, num_rows),
        position=inputs.below(1000, num_rows),
    )


def _case(kernels: Kernels, logits: Tensor, name: str, sampling: TokenSampling) -> Case:
    num_rows, vocab_size = logits.shape
    return Case(
        f"{name}, {num_rows} x {vocab_size}",
        lambda: kernels.sample_tokens(logits, sampling),
        lambda: reference.sample_tokens(logits, sampling).double(),
        num_bytes(logits),
        lambda: reference.sample_tokens(logits, sampling),
        tolerance=0.0,
    )
