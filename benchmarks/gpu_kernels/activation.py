"""Gated SiLU of a decode step and of a prompt; every other kind once, small."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from gpu_kernels.case import Case, Inputs, num_bytes
from trivium_kernels import reference
from trivium_kernels.activation import Activation
from trivium_kernels.dispatch import Kernels


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    for num_rows, width in ((64, 14336), (4096, 14336)) if full else ():
        yield _gated(kernels, inputs, Activation.SILU, num_rows, width)
    for kind in Activation:
        yield _gated(kernels, inputs, kind, 16, 64)
    yield _plain(kernels, inputs, Activation.GELU, *((4096, 4096) if full else (3, 80)))


def _gated(kernels: Kernels, inputs: Inputs, kind: Activation, num_rows: int, width: int) -> Case:
    gate_up = inputs.normal(num_rows, 2 * width)
    return Case(
        f"gated {kind}, {num_rows} x {width}",
        lambda: kernels.gated_activate(gate_up, kind),
        lambda: reference.gated_activate(gate_up.double(), kind),
        num_bytes(gate_up) * 3 // 2,
        (lambda: _torch_silu(gate_up)) if kind is Activation.SILU else None,
    )


def _plain(kernels: Kernels, inputs: Inputs, kind: Activation, num_rows: int, width: int) -> Case:
    x = inputs.normal(num_rows, width)
    return Case(
        f"{kind}, {num_rows} x {width}",
        lambda: kernels.activate(x, kind),
        lambda: reference.activate(x.double(), kind),
        2 * num_bytes(x),
        lambda: F.gelu(x),
    )


def _torch_silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
