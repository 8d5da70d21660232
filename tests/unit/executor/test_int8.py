"""int8 reaches every native family: nearly the logits of float32, and not the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import save_tiny
from tiny_decoders import DECODER_BUILDERS
from trivium.executor.linear import Linear, Product
from unit.executor.mini_scheduler import MiniScheduler
from unit.executor.parity import add_random_requests, make_runner, record_logits

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "bart", "marian", "m2m_100", "t5", "t5_gated", "umt5")


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_stays_near_float32(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny(family, tmp_path)
    logits = record_logits(monkeypatch)
    for quantization in (None, "int8"):
        scheduler = MiniScheduler(make_runner(path, quantization=quantization))
        add_random_requests(scheduler)
        scheduler.step()
    exact, rounded = logits
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=-1).median() > 0.97


@pytest.mark.parametrize("family", sorted({*FAMILIES, *DECODER_BUILDERS}))
def test_every_linear_layer_is_packed(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Linear] = []
    packed: list[Linear] = []
    make, use = Linear.__init__, Linear.use

    def record_made(linear: Linear, *args: Any, **settings: Any) -> None:
        make(linear, *args, **settings)
        made.append(linear)

    def record_packed(linear: Linear, product: Product) -> None:
        use(linear, product)
        packed.append(linear)

    monkeypatch.setattr(Linear, "__init__", record_made)
    monkeypatch.setattr(Linear, "use", record_packed)
    make_runner(save_tiny(family, tmp_path), quantization="int8")
    assert len(made) >= 4
    assert sorted(map(id, packed)) == sorted(map(id, made))
