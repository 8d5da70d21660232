"""Where the C++ kernels were not built, models compute the same in plain torch, and the log says why they are slow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import trivium_kernels
from tiny import load_oracle, save_tiny
from unit.executor.mini_scheduler import MiniScheduler
from unit.executor.parity import add_random_requests, generate, make_runner


@pytest.mark.parametrize("family", ["gemma2", "bart", "t5"])
def test_a_model_runs_in_plain_torch(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "trivium_kernels.cpu", None)
    monkeypatch.delattr(trivium_kernels, "cpu", raising=False)  # an import by somebody else has left it there
    path = save_tiny(family, tmp_path / family)
    scheduler = MiniScheduler(make_runner(path))
    requests = add_random_requests(scheduler)
    scheduler.run()
    assert "the C++ kernels cannot be used" in caplog.text
    oracle = load_oracle(path)
    for request in requests:
        assert request.output == generate(oracle, request)
