"""Log-probabilities of what a step has sampled, with and without the most likely tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_kernels.case import Case, Inputs, num_bytes
from trivium_kernels.dispatch import Kernels


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    num_rows, vocab_size = (64, 128256) if full else (3, 2100)
    logits = 3 * inputs.normal(num_rows, vocab_size, dtype=torch.float32)
    token_ids = inputs.below(vocab_size, num_rows)
    for num_top in (0, 5, 20):
        yield _case(kernels, logits, token_ids, num_top)


def _case(kernels: Kernels, logits: Tensor, token_ids: Tensor, num_top: int) -> Case:
    def run() -> Tensor:
        found = kernels.gather_logprobs(logits, token_ids, num_top=num_top)
        return torch.cat((found.logprobs[:, None], found.top_logprobs), dim=1)

    return Case(
        f"top {num_top}, {len(logits)} x {logits.shape[1]}",
        run,
        lambda: _by_softmax(logits.double(), token_ids, num_top),
        num_bytes(logits),
        lambda: _by_softmax(logits, token_ids, num_top),
        tolerance=1e-5,
    )


def _by_softmax(logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    logprobs = logits.log_softmax(dim=-1)
    return torch.cat((logprobs.gather(1, token_ids[:, None]), logprobs.topk(num_top, dim=-1).values), dim=1)
