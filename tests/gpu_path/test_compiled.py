"""What the interpreter lets pass and a compiler does not, for the kernels as models launch them."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_checks import TRITON

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {"_rms_norm_kernel", "_rotate_and_cache_kernel", "_attend_single_kernel", "_attend_tiles_kernel"}
# `make soak` compiles those of one family of each graph, and of weights in 8 and 4 bits.
SOAKED = ("llama", "qwen3:int8", "llama:gptq-own-order", "llama:fp8-tensor", "gemma2", "gpt2", "bart", "t5")
FAMILIES = SOAKED if os.environ.get("TRIVIUM_SOAK_GPU") else ("llama",)


@pytest.mark.skipif(TRITON, reason="the interpreter compiles nothing")
@pytest.mark.timeout(600)
def test_kernels_compile_as_models_launch_them(tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # 9 s of work for a family, of which a busy machine makes minutes
    path = os.pathsep.join(str(ROOT / folder) for folder in ("services", "kernels", "tests", "benchmarks"))
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, "-P", str(ROOT / "tests" / "compiled_steps.py"), *FAMILIES]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=590)
    assert run.returncode == 0, run.stderr[-5000:]
    assert set(run.stdout.split()) >= EXPECTED
