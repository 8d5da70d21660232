"""Clusters that several tests share. All of integration runs in one worker: two clusters at a time are enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster, serve
from tiny import FAMILIES, save_tiny


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
