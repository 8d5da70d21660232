"""Counting the tokens of a step, and penalties for what rows have said."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_kernels.case import Case, Inputs, after, num_bytes
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels
from trivium_kernels.penalties import Penalties, TokenCounts


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    num_rows, vocab_size = (64, 128256) if full else (3, 1100)
    in_prompt = inputs.below(2**20, num_rows, -(-vocab_size // 32), dtype=torch.int32)
    counts = TokenCounts(in_prompt, inputs.below(2, num_rows, vocab_size, dtype=torch.int32))
    slots, token_ids = inputs.different(num_rows, num_rows), inputs.below(vocab_size, num_rows)
    yield _penalties(kernels, inputs, counts, slots)
    yield _output_counts(kernels, counts, slots, token_ids)
    yield _prompt_tokens(kernels, counts, slots, token_ids)


def _penalties(kernels: Kernels, inputs: Inputs, counts: TokenCounts, slots: Tensor) -> Case:
    num_rows, vocab_size = counts.in_output.shape
    logits = inputs.normal(num_rows, vocab_size, dtype=torch.float32)
    penalties = Penalties(*(inputs.normal(num_rows, dtype=torch.float32).abs() + 0.5 for _ in range(3)))

    def expected() -> Tensor:
        wanted = logits.double()
        reference.apply_penalties(wanted, counts, slots, penalties)
        return wanted

    return Case(
        f"penalties, {num_rows} x {vocab_size}",
        after(lambda: kernels.apply_penalties(logits, counts, slots, penalties), logits),
        expected,
        num_bytes(logits, logits, counts.in_output, counts.in_prompt),
        lambda: reference.apply_penalties(logits, counts, slots, penalties),
        tolerance=1e-6,
    )


def _output_counts(kernels: Kernels, counts: TokenCounts, slots: Tensor, token_ids: Tensor) -> Case:
    def expected() -> Tensor:
        wanted = TokenCounts(counts.in_prompt, counts.in_output.clone())
        reference.count_tokens(wanted, slots, token_ids, of_output=True)
        return wanted.in_output.double()

    return Case(
        f"counts of {len(slots)} tokens",
        after(lambda: kernels.count_tokens(counts, slots, token_ids, of_output=True), counts.in_output),
        expected,
        num_bytes(slots, token_ids) + 8 * len(slots),
        lambda: reference.count_tokens(counts, slots, token_ids, of_output=True),
        tolerance=0.0,
    )


def _prompt_tokens(kernels: Kernels, counts: TokenCounts, slots: Tensor, token_ids: Tensor) -> Case:
    def expected() -> Tensor:
        wanted = counts.in_prompt.clone()
        wanted[slots, token_ids // 32] |= torch.ones_like(token_ids, dtype=torch.int32) << (token_ids % 32).int()
        return wanted.double()

    return Case(
        f"{len(slots)} tokens of prompts",
        after(lambda: kernels.count_tokens(counts, slots, token_ids, of_output=False), counts.in_prompt),
        expected,
        num_bytes(slots, token_ids) + 8 * len(slots),
        tolerance=0.0,
    )
