"""Clusters that several tests share. All of integration runs in one worker: two clusters at a time are enough."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster, serve
from tiny import FAMILIES, save_tiny
from trivium import LLM
from trivium.errors import EngineUnavailableError


@pytest.fixture(autouse=True)
def nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """An `LLM` that is closed holds no KV block: `cluster.serve` sees to the same for processes."""
    close = LLM.close

    def checked_close(self: LLM) -> None:
        held = 0
        with contextlib.suppress(EngineUnavailableError):  # it was closed before, or never started
            held = self.engine_loop.scheduler.num_held_blocks
        close(self)
        assert held == 0, f"{held} blocks are held"

    monkeypatch.setattr(LLM, "close", checked_close)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> a tiny random checkpoint with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        save_tiny(family, folder / family, with_tokenizer=True)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`trivium serve` without arguments."""
    with serve(log=tmp_path_factory.mktemp("bundled") / "serve.log") as cluster:
        yield cluster
