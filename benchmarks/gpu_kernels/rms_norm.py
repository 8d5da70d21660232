"""Norms of a decode step and of a prompt, plain and with the residual."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from gpu_kernels.case import Case, Inputs, num_bytes
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels

EPS = 1e-5


def cases(kernels: Kernels, inputs: Inputs, *, full: bool) -> Iterator[Case]:
    for num_rows, width in ((64, 4096), (4096, 4096)) if full else ((3, 80),):
        yield _plain(kernels, inputs, num_rows, width)
        yield _with_residual(kernels, inputs, num_rows, width)


def _plain(kernels: Kernels, inputs: Inputs, num_rows: int, width: int) -> Case:
    x, weight = inputs.normal(num_rows, width), inputs.normal(width)
    return Case(
        f"{num_rows} x {width}",
        lambda: kernels.rms_norm(x, weight, EPS),
        lambda: reference.rms_norm(x.double(), weight.double(), EPS),
        2 * num_bytes(x),
        lambda: F.rms_norm(x, (width,), weight, EPS),
    )


def _with_residual(kernels: Kernels, inputs: Inputs, num_rows: int, width: int) -> Case:
    update, residual, weight = inputs.normal(num_rows, width), inputs.normal(num_rows, width), inputs.normal(width)
    return Case(
        f"{num_rows} x {width}, with residual",
        lambda: kernels.add_rms_norm(update, residual, weight, EPS),
        lambda: reference.rms_norm((residual + update).double(), weight.double(), EPS),
        4 * num_bytes(update),
        lambda: F.rms_norm(residual.add_(update), (width,), weight, EPS),
    )
