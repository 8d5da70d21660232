"""In the last layer only the tokens go on whose logits are wanted: the same bits as when all of them do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import save_tiny
from tiny_decoders import DECODER_BUILDERS
from trivium.executor.forward import ForwardPasses
from trivium.params import SamplingParams
from unit.executor.mini_scheduler import MiniScheduler
from unit.executor.parity import add_random_requests, make_runner, record_logits
from unit.executor.test_fallback import RUNNING, save

FAMILIES = (*DECODER_BUILDERS, "bart", "t5", next(iter(RUNNING)))
SAMPLING = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


def load(family: str, tmp_path: Path) -> Path:
    return save(family, tmp_path) if family in RUNNING else save_tiny(family, tmp_path)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(family: str, chunk: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = load(family, tmp_path)
    run, logits = ForwardPasses.run_decoder, record_logits(monkeypatch)
    found: list[tuple[list[list[int]], list[Tensor]]] = []
    for is_narrowed in (True, False):

        def run_decoder(passes: Any, batch: Any, rows: Any, *, is_only_sampled: bool, on: bool = is_narrowed) -> Tensor:
            hidden = run(passes, batch, rows, is_only_sampled=is_only_sampled and on)
            if on and is_only_sampled and len(rows.positions) > len(rows.slots):
                assert len(hidden) == max(1, int(batch.rows_that_sample(rows).sum()))
            return hidden

        monkeypatch.setattr(ForwardPasses, "run_decoder", run_decoder)
        scheduler = MiniScheduler(make_runner(path), chunk=chunk, seed=3)
        requests = add_random_requests(scheduler, 4, sampling=SAMPLING)
        scheduler.run()
        found.append(([request.output for request in requests], logits.copy()))
        logits.clear()
    (narrowed, narrowed_logits), (whole, whole_logits) = found
    assert narrowed == whole
    is_ours = family not in RUNNING
    for one, other in zip(narrowed_logits, whole_logits, strict=True):
        assert torch.equal(one, other) if is_ours else torch.allclose(one, other, atol=1e-4)


def test_tokens_that_something_else_is_asked_of_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny("llama", tmp_path)
    asked: list[bool] = []
    run = ForwardPasses.run_decoder

    def run_decoder(passes: Any, batch: Any, rows: Any, *, is_only_sampled: bool) -> Tensor:
        asked.append(is_only_sampled)
        return run(passes, batch, rows, is_only_sampled=is_only_sampled)

    monkeypatch.setattr(ForwardPasses, "run_decoder", run_decoder)
    for sampling, expected in (
        (SAMPLING, True),
        (SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1), False),
        (SamplingParams(temperature=0.0, max_tokens=2, logprobs=1), True),
    ):
        asked.clear()
        scheduler = MiniScheduler(make_runner(path))
        scheduler.add([5, 6, 7, 8, 9], sampling)
        scheduler.step()
        assert asked == [expected]
