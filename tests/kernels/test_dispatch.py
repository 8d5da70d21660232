"""Which kernels a device gets."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from kernel_checks import only_triton
from trivium_kernels.dispatch import Kernels, select_kernels


def test_a_device_without_kernels_is_named() -> None:
    with pytest.raises(ValueError, match="no kernels for device 'meta'"):
        select_kernels(torch.device("meta"))


def test_every_op_has_an_implementation_of_its_own_on_each_device(kernels: Kernels) -> None:
    names = [field.name for field in fields(Kernels)]
    assert {getattr(kernels, name).__name__ for name in names} == set(names)


@only_triton
def test_a_gpu_gets_triton(kernels: Kernels) -> None:
    others = {
        field.name
        for field in fields(Kernels)
        if not getattr(kernels, field.name).__module__.startswith("trivium_kernels.gpu.")
    }
    assert others == {"add_lora"}  # groups of rows known on the host: a product of torch for each
