"""gather_logprobs against log_softmax and sorting in float64."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import DTYPES, randn
from trivium_kernels.dispatch import Kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "num_top"), [(1, 1), (7, 7), (2500, 5), (300, 300), (2048, 0)])
def test_gather_logprobs(kernels: Kernels, vocab_size: int, num_top: int, dtype: torch.dtype) -> None:
    logits = 5 * randn(4, vocab_size, dtype=dtype) + 20
    token_ids = torch.tensor([0, vocab_size - 1, vocab_size // 2, int(logits[3].argmax())])
    found = kernels.gather_logprobs(logits, token_ids, num_top=num_top)
    logprobs = logits.double().log_softmax(-1)
    values, order = logprobs.sort(dim=-1, descending=True, stable=True)
    chosen = logprobs.gather(1, token_ids[:, None])
    tolerance = {"atol": 5e-6, "rtol": 1e-6}  # of logits of 20
    torch.testing.assert_close(found.logprobs, chosen.squeeze(1).float(), **tolerance)
    assert found.ranks.tolist() == (1 + (logprobs > chosen).sum(-1)).tolist()
    torch.testing.assert_close(found.top_logprobs, values[:, :num_top].float(), **tolerance)
    assert found.top_token_ids.tolist() == order[:, :num_top].tolist()


def test_banned_tokens_come_last_in_the_order_of_the_vocabulary(kernels: Kernels) -> None:
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, [2500, 17]] = torch.tensor([1.0, 2.0])
    found = kernels.gather_logprobs(logits, torch.tensor([5]), num_top=4)
    assert found.top_token_ids.tolist() == [[17, 2500, 0, 1]]
    assert found.top_logprobs[0, 2:].tolist() == [-torch.inf, -torch.inf]
    assert found.logprobs.tolist() == [-torch.inf]
    assert found.ranks.tolist() == [3]


def test_a_row_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    logits, token_ids = randn(3, 2500), torch.tensor([4, 2400, 9])
    together = kernels.gather_logprobs(logits, token_ids, num_top=3)
    for row in range(3):
        alone = kernels.gather_logprobs(logits[row : row + 1], token_ids[row : row + 1], num_top=3)
        assert torch.equal(alone.logprobs[0], together.logprobs[row])
        assert torch.equal(alone.top_logprobs[0], together.top_logprobs[row])
