"""The benchmark of the kernels: what it can do without a GPU, and that no op is missing anywhere."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_checks import TRITON, only_triton
from trivium_kernels.dispatch import Kernels

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
KERNELS = ROOT / "kernels" / "trivium_kernels"
OPS = sorted(path.stem for path in KERNELS.glob("[a-z]*.py") if path.stem != "dispatch")


def run_benchmark(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=390)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_name_everywhere(op: str) -> None:
    assert (KERNELS / "reference" / f"{op}.py").exists()
    assert (ROOT / "tests" / "kernels" / f"test_{op}.py").exists()
    if op != "add_lora":  # plain torch everywhere: what a GPU runs is add_stacked_lora
        assert (KERNELS / "gpu" / f"{op}.py").exists()
        assert (ROOT / "benchmarks" / "gpu_kernels" / f"{op}.py").exists()


@only_triton
@pytest.mark.parametrize("op", [op for op in OPS if op != "add_lora"])
def test_what_the_benchmark_measures_is_right(kernels: Kernels, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    torch.manual_seed(0)
    for case in gpu.find_cases(kernels, op, torch.device("cpu"), full=False):
        assert gpu.relative_error(case) <= case.tolerance, case.shape
        if case.peer is not None:
            case.peer()


@pytest.mark.skipif(TRITON, reason="the interpreter compiles nothing")
@pytest.mark.timeout(400)
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """To machine code, by types and constants of real launches: what the interpreter lets pass and a GPU would not."""
    faulthandler.cancel_dump_traceback_later()  # 15 s of work, of which a busy machine makes minutes
    run = run_benchmark("--compile", "90", "--tiny", TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr[-5000:]
    lines = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")][2:]
    assert {line[0].removeprefix("| ") for line in lines} == set(OPS) - {"add_lora"}
    assert [line for line in lines if line[5] != "0"] == []  # nothing is spilled


@pytest.mark.skipif(TRITON, reason="the same in both runs")
def test_without_a_gpu_it_says_so() -> None:
    run = run_benchmark(CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2
    assert "needs a GPU" in run.stderr
