"""`gather_logprobs` in plain torch."""

from __future__ import annotations

from torch import Tensor

from trivium_kernels.gather_logprobs import GatheredLogprobs


def gather_logprobs(logits: Tensor, token_ids: Tensor, *, num_top: int) -> GatheredLogprobs:
    logits = logits.float()
    norm = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, token_ids[:, None])
    values, indices = logits.sort(dim=-1, descending=True, stable=True)
    return GatheredLogprobs(
        logprobs=(chosen - norm).squeeze(1),
        ranks=(logits > chosen).sum(dim=-1) + 1,
        top_logprobs=values[:, :num_top] - norm,
        top_token_ids=indices[:, :num_top],
    )
