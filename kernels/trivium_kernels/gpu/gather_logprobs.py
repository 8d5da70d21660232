"""`gather_logprobs` in Triton: the logits are read once."""

from __future__ import annotations

from torch import Tensor

from trivium_kernels.gather_logprobs import GatheredLogprobs
from trivium_kernels.gpu.top_tokens import MAX_TOP, top_tokens


def gather_logprobs(logits: Tensor, token_ids: Tensor, *, num_top: int) -> GatheredLogprobs:
    found = top_tokens(logits, num_top if num_top <= MAX_TOP else 0, token_ids=token_ids)
    assert found.logprobs is not None and found.ranks is not None
    top_logprobs, top_token_ids = found.values, found.token_ids
    if num_top > MAX_TOP:
        values, top_token_ids = logits.float().sort(dim=-1, descending=True, stable=True)
        top_logprobs, top_token_ids = values[:, :num_top] - found.norms[:, None], top_token_ids[:, :num_top]
    return GatheredLogprobs(found.logprobs, found.ranks, top_logprobs, top_token_ids)
