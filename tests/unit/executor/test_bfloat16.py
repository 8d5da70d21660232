"""`--dtype bfloat16` on a CPU: products of bfloat16 in every family, nearer to float32 than transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny import load_oracle, save_tiny
from trivium_kernels.cpu import WeightType, can_pack
from unit.executor.mini_scheduler import MiniRequest, MiniScheduler
from unit.executor.parity import add_random_requests, make_runner, record_logits

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "bart", "marian", "t5", "t5_gated")

pytestmark = pytest.mark.skipif(
    not can_pack(WeightType.BFLOAT16_PAIRS), reason="this processor does not multiply bfloat16"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_bfloat16_are_nearer_to_float32_than_a_model_in_bfloat16(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny(family, tmp_path)
    logits = record_logits(monkeypatch)
    for dtype in ("auto", "bfloat16"):
        scheduler = MiniScheduler(make_runner(path, dtype=dtype))
        requests = add_random_requests(scheduler)
        scheduler.step()
    exact, rounded = logits
    oracle = load_oracle(path).to(torch.bfloat16)
    theirs = torch.stack([last_logits(oracle, request) for request in requests])
    assert not torch.equal(exact, rounded)
    assert mean_error(rounded, exact) < mean_error(theirs, exact)


def last_logits(oracle: torch.nn.Module, request: MiniRequest) -> Tensor:
    """Of the token after the prompt, [vocab_size]."""
    ids = torch.tensor([request.encoder or request.prompt])
    extra = {"decoder_input_ids": torch.tensor([request.prompt])} if request.encoder else {}
    with torch.inference_mode():
        logits: Tensor = oracle(ids, **extra).logits
    return logits[0, -1].float()


def mean_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().mean())
