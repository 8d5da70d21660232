"""Compiles every kernel that steps of tiny models launch, with the types that they launch it with, for a GPU that is
not there: python tests/compiled_steps.py FAMILY[:QUANTIZATION] ... Prints the names of the kernels. QUANTIZATION is
"int8", or the name of a format in `quantized_checkpoints.py`. It finds its modules by PYTHONPATH, as
`gpu_path/test_compiled.py` sets it.

As `benchmarks/compile_kernels.py`, with models in place of cases. The process has no other Triton afterwards.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from compile_kernels import Driver
from triton.runtime.jit import JITFunction

from one_device import META, zeros_like
from quantized_checkpoints import FORMATS, quantized
from tiny import save_tiny
from trivium.config import ExecutorConfig
from trivium.executor import transfers
from trivium.executor.model_runner import ModelRunner
from trivium.executor.platform import Platform
from trivium_kernels.dispatch import select_kernels
from unit.executor.mini_scheduler import MiniScheduler
from unit.executor.parity import add_random_requests

CAPABILITY = 90


def compile_steps(family: str, quantization: str | None) -> None:
    """A step of prompts, of more rows than products of few have, and one of single tokens, in bfloat16."""
    folder = Path(tempfile.mkdtemp())
    is_packed = quantization in FORMATS
    path = quantized(family, str(quantization), folder)[0] if is_packed else save_tiny(family, folder)
    config = ExecutorConfig(
        model=str(path),
        served_model_name="tiny",
        max_num_seqs=8,
        max_model_len=64,
        kv_cache_memory_bytes=2**23,
        quantization=None if is_packed else quantization,
    )
    platform = Platform(META, torch.bfloat16, select_kernels(torch.device("cuda")), is_gpu=True)
    scheduler = MiniScheduler(ModelRunner(config, choose=lambda *_: platform))
    add_random_requests(scheduler, count=5)
    scheduler.step()
    scheduler.step()


def main() -> None:
    names: set[str] = set()

    def getitem(kernel: Any, grid: object) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            names.add(kernel.fn.__name__)
            kernel.run(*args, grid=grid, warmup=True, **kwargs)

        return launch

    triton.runtime.driver.set_active(Driver(CAPABILITY))
    JITFunction.__getitem__ = getitem
    transfers.download = zeros_like
    transfers.Download.numbers = lambda download: zeros_like(download._copy)  # type: ignore[method-assign]
    torch.equal = lambda *_: False
    for family in sys.argv[1:]:
        name, _, quantization = family.partition(":")
        compile_steps(name, quantization or None)
    print(*sorted(names), sep="\n")


if __name__ == "__main__":
    main()
