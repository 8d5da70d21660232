"""Runs the tests of this folder once more, with the Triton sources, in Triton's interpreter."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_checks import TRITON

FOLDER = Path(__file__).parent


@pytest.mark.skipif(TRITON, reason="this is that run")
@pytest.mark.timeout(900)
def test_the_triton_sources_pass_the_same_tests() -> None:
    faulthandler.cancel_dump_traceback_later()  # each test of the other process has that watchdog for itself
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(FOLDER)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=env, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-5000:]
