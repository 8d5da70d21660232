"""The chart, loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import helm_python
import pytest


@pytest.fixture(scope="session")
def chart_path() -> Path:
    return Path(__file__).parents[2] / "helm" / "trivium"


@pytest.fixture(scope="session")
def chart(chart_path: Path) -> Iterator[helm_python.Chart]:
    with helm_python.Chart.load(chart_path) as loaded:
        yield loaded
