"""Compiling every kernel for a GPU that is not there: Triton brings the whole way to machine code.

Triton is told of a driver that knows its target and nothing else, and launches become compilations. The cases are those
of the benchmark, on tensors without memory, so types, strides and constants are those of a real launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from gpu import find_cases, table_line
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from trivium_kernels.dispatch import select_kernels

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_HEADER = ("op", "shape", "kernel", "warps", "registers", "spilled bytes", "shared bytes")


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """What one program takes. spilled_bytes: of each thread, because registers did not suffice."""

    name: str
    num_warps: int
    num_registers: int
    spilled_bytes: int
    shared_bytes: int


class Driver:
    """As much of a driver as compilation asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(ops: Sequence[str], capability: int, *, full: bool) -> Iterator[tuple[str, str, CompiledKernel]]:
    """(op, shape, kernel) of every kernel that the cases of `ops` launch, each specialization once.

    Triton has no other driver in this process afterwards. Raises Triton's errors for what does not compile.
    """
    triton.runtime.driver.set_active(Driver(capability))
    launched: list[Any] = []
    plain_getitem = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda self, grid: (
        lambda *args, **kwargs: launched.append(self.run(*args, grid=grid, warmup=True, **kwargs))
    )
    seen: set[int] = set()
    try:
        kernels = select_kernels(torch.device("cuda"))
        for op in ops:
            for case in find_cases(kernels, op, torch.device("meta"), full=full):
                case.run()
                for kernel in launched:
                    if id(kernel) not in seen:
                        seen.add(id(kernel))
                        yield op, case.shape, _describe(kernel)
                launched.clear()
    finally:
        JITFunction.__getitem__ = plain_getitem


def print_compiled(ops: Sequence[str], capability: int, *, full: bool) -> None:
    print(f"# Kernels, compiled for capability {capability} by Triton {triton.__version__}\n")
    print(table_line(_HEADER), table_line(["---"] * len(_HEADER)), sep="\n")
    for op, shape, kernel in compiled(ops, capability, full=full):
        numbers = (kernel.num_warps, kernel.num_registers, kernel.spilled_bytes, kernel.shared_bytes)
        print(table_line([op, shape, kernel.name, *map(str, numbers)]), flush=True)


def _describe(kernel: Any) -> CompiledKernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    metadata = kernel.metadata
    return CompiledKernel(metadata.name, metadata.num_warps, int(found[1]), int(found[2]), metadata.shared)
