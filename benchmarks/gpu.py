"""On a GPU: python benchmarks/gpu.py [--only OP ...] [--models [NAME ...]] [--runs N] [--compile [CAPABILITY] [--tiny]]

Checks every kernel against float64, and measures it against the least time that its bytes and operations take on this
GPU, and against torch's own way. Every run starts with a cold cache and is a replay of a recorded graph where that is
possible, so that no time of the host counts. Exit code 1 if a result is wrong, 2 without a GPU.

Then decode steps of whole models with random weights (1b, 8b, 8b-awq, 8b-fp8), against the least time that their bytes
take and against transformers. --only leaves them out, --models alone leaves the kernels out.

--compile needs no GPU: it compiles every kernel for one (90: H100) and says what each program takes of it; with --tiny
for a few small inputs only.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu_kernels.case import Case, Inputs

from trivium_kernels.dispatch import Kernels, select_kernels

_CASES = Path(__file__).parent / "gpu_kernels"
OPS = tuple(sorted(path.stem for path in _CASES.glob("[a-z]*.py") if path.stem != "case"))
MODELS = ("1b", "8b", "8b-awq", "8b-fp8")  # of gpu_models.py, which needs transformers
HEADER = ("op", "shape", "error", "us", "floor us", "of the floor", "torch us", "torch / ours")
_CACHE_BYTES = 2**28  # more than the level-2 cache of any GPU
_COPIED_BYTES = 2**31
_MATRIX = 8192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OPS, metavar="OP")
    parser.add_argument("--models", nargs="*", choices=MODELS, metavar="NAME")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--compile", nargs="?", type=int, const=90, metavar="CAPABILITY")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.compile is not None:
        from compile_kernels import print_compiled  # it puts a driver without a GPU into Triton

        print_compiled(args.only or OPS, args.compile, full=not args.tiny)
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a GPU that torch can use; --compile does not", file=sys.stderr)
        return 2
    ops, models = what_to_measure(args.only, args.models)
    return measure(ops, models, args.runs)


def what_to_measure(only: list[str] | None, models: list[str] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(ops, models) of the flags: what is not named is left out if something else is; an empty list is all models."""
    ops = tuple(only) if only is not None else OPS if models is None else ()
    if models is None:
        return ops, () if only is not None else MODELS
    return ops, tuple(models) or MODELS


def find_cases(kernels: Kernels, op: str, device: torch.device, *, full: bool) -> Iterator[Case]:
    return importlib.import_module(f"gpu_kernels.{op}").cases(kernels, Inputs(device), full=full)


def relative_error(case: Case) -> float:
    """Of one run, as a share of the largest number of the result; infinite where there should be another infinity."""
    expected = case.expected().double()
    found = case.run().double()
    assert found.shape == expected.shape, f"{case.shape}: {list(found.shape)} instead of {list(expected.shape)}"
    is_finite = expected.isfinite()
    if not torch.equal(found[~is_finite], expected[~is_finite]) or not bool(found[is_finite].isfinite().all()):
        return float("inf")
    largest = expected[is_finite].abs().max().clamp(min=1e-30) if bool(is_finite.any()) else 1.0
    return float(((found - expected)[is_finite].abs() / largest).max()) if bool(is_finite.any()) else 0.0


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """Measured in the same run: bytes read and written per second, bfloat16 operations per second."""

    bytes_per_s: float
    flops_per_s: float

    def least_seconds(self, case: Case) -> float:
        return max(case.num_bytes / self.bytes_per_s, case.num_flops / self.flops_per_s)

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e9:.0f} GB/s copied, {self.flops_per_s / 1e12:.0f} TFLOP/s in bfloat16"


def measure_limits(timer: Timer) -> GpuLimits:
    source = torch.empty(_COPIED_BYTES // 2, dtype=torch.uint8, device="cuda")
    target, matrix = torch.empty_like(source), torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=torch.bfloat16)
    copied = timer.seconds(lambda: target.copy_(source))
    return GpuLimits(_COPIED_BYTES / copied, 2 * _MATRIX**3 / timer.seconds(lambda: matrix @ matrix))


class Timer:
    """Owns what empties the cache between runs."""

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._filler = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(self, work: Callable[[], object]) -> float:
        """The median of the runs."""
        replay, times = recorded(work) or work, []
        for _ in range(self._runs + 3):
            self._filler.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times[3:])


def recorded(work: Callable[[], object]) -> Callable[[], object] | None:
    """`work` as a CUDA graph, or None where it waits for the device, as some of torch's own ways do."""
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def measure(ops: tuple[str, ...], models: tuple[str, ...], runs: int) -> int:
    timer, device = Timer(runs), torch.device("cuda")
    limits, kernels = measure_limits(timer), select_kernels(device)
    print(f"{torch.cuda.get_device_name()}: {limits}; torch {torch.__version__}; medians of {runs} runs\n")
    num_wrong = measure_ops(ops, timer, limits, kernels, device) if ops else 0
    if models:
        from gpu_models import HEADER as MODELS_HEADER
        from gpu_models import measure_models

        print("\n# Decode steps\n")
        print(table_line(MODELS_HEADER), table_line(["---"] * len(MODELS_HEADER)), sep="\n")
        del timer
        torch.cuda.empty_cache()
        for cells in measure_models(models, limits.bytes_per_s, limits.flops_per_s, min(runs, 5)):
            print(table_line(cells), flush=True)
    return 1 if num_wrong else 0


def measure_ops(ops: tuple[str, ...], timer: Timer, limits: GpuLimits, kernels: Kernels, device: torch.device) -> int:
    """How many results are wrong."""
    print("# Kernels\n")
    print(table_line(HEADER), table_line(["---"] * len(HEADER)), sep="\n")
    num_wrong = 0
    for op in ops:
        torch.manual_seed(0)
        for case in find_cases(kernels, op, device, full=True):
            error = relative_error(case)
            is_wrong = error > case.tolerance
            num_wrong += is_wrong
            print(table_line(result_line(op, case, error, timer, limits)) + (" WRONG" if is_wrong else ""), flush=True)
    return num_wrong


def result_line(op: str, case: Case, error: float, timer: Timer, limits: GpuLimits) -> list[str]:
    seconds, least = timer.seconds(case.run), limits.least_seconds(case)
    line = [op, case.shape, f"{error:.1e}", f"{1e6 * seconds:.1f}", f"{1e6 * least:.1f}", f"{least / seconds:.0%}"]
    if case.peer is None:
        return [*line, "", ""]
    peer_seconds = timer.seconds(case.peer)
    return [*line, f"{1e6 * peer_seconds:.1f}", f"{peer_seconds / seconds:.2f}"]


def table_line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
