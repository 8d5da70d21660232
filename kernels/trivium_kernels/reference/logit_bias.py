"""`logit_bias` in plain torch."""

from __future__ import annotations

from torch import Tensor


def add_logit_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, biases: Tensor) -> None:
    kept = (rows >= 0) & (token_ids < logits.shape[1])
    logits[rows[kept], token_ids[kept]] += biases[kept].to(logits.dtype)
