"""Tests that share processes run in the same worker: otherwise each worker starts them again."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("groups")
def test_workers_take_whole_groups(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("one process runs everything")
    assert request.node.nodeid.endswith("@groups"), "pytest-xdist and pytest do not fit together"
