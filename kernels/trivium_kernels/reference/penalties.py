"""`penalties` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium_kernels.penalties import Penalties, TokenCounts


def count_tokens(counts: TokenCounts, slots: Tensor, token_ids: Tensor, *, of_output: bool) -> None:
    kept = (slots >= 0) & (token_ids >= 0) & (token_ids < counts.in_output.shape[1])
    slots, token_ids = slots[kept], token_ids[kept]
    if of_output:
        ones = torch.ones_like(slots, dtype=torch.int32)
        counts.in_output.index_put_((slots, token_ids), ones, accumulate=True)
        return
    bits = torch.ones_like(token_ids, dtype=torch.int32) << (token_ids % 32).int()
    for slot, word, bit in zip(slots.tolist(), (token_ids // 32).tolist(), bits, strict=True):
        counts.in_prompt[slot, word] |= bit


def apply_penalties(logits: Tensor, counts: TokenCounts, slots: Tensor, penalties: Penalties) -> None:
    vocab_size = logits.shape[1]
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    in_prompt = ((counts.in_prompt[slots][:, :, None] >> shifts) & 1).bool().flatten(1)[:, :vocab_size]
    in_output = counts.in_output[slots]  # [num_rows, vocab_size]
    repetition = penalties.repetition[:, None]
    scaled = torch.where(logits < 0, logits * repetition, logits / repetition)
    changed = torch.where(in_prompt | (in_output > 0), scaled, logits)
    changed = changed - penalties.frequency[:, None] * in_output
    logits.copy_(changed - penalties.presence[:, None] * (in_output > 0))
