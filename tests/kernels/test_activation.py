"""activate and gated_activate against each formula, one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from kernel_checks import assert_near, randn
from trivium_kernels.activation import Activation
from trivium_kernels.dispatch import Kernels

FORMULAS = {
    Activation.RELU: lambda x: max(x, 0.0),
    Activation.SILU: lambda x: x / (1 + math.exp(-x)),
    Activation.GELU: lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    Activation.GELU_TANH: lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    Activation.QUICK_GELU: lambda x: x / (1 + math.exp(-1.702 * x)),
    Activation.RELU2: lambda x: max(x, 0.0) ** 2,
    Activation.RELU6: lambda x: min(max(x, 0.0), 6.0),
    Activation.LEAKY_RELU: lambda x: x if x > 0 else 0.01 * x,
    Activation.HARDSWISH: lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
    Activation.MISH: lambda x: x * math.tanh(math.log1p(math.exp(x))),
    Activation.TANH: math.tanh,
    Activation.SIGMOID: lambda x: 1 / (1 + math.exp(-x)),
    Activation.LINEAR: lambda x: x,
}


@pytest.mark.parametrize("kind", list(Activation))
def test_activations(kernels: Kernels, kind: Activation) -> None:
    gate, up = torch.cat((4 * randn(3, 5), torch.tensor([[-90.0, 90.0, 0.0, -0.5, 20.5]]))), randn(4, 5, seed=1)
    formula = FORMULAS[kind]
    expected = torch.tensor([formula(value) for value in gate.flatten().tolist()], dtype=torch.float64).view(4, 5)
    for x, wanted in ((gate, expected), (gate[:3], expected[:3])):  # with numbers that hide the others, and without
        assert_near(kernels.activate(x.clone(), kind), wanted)
        gated = kernels.gated_activate(torch.cat((x, up[: len(x)]), -1), kind)
        assert_near(gated, wanted * up[: len(x)])


@pytest.mark.parametrize("width", [1, 80, 1030])
def test_bfloat16_and_widths_that_fill_no_tile(kernels: Kernels, width: int) -> None:
    gate_up = randn(2, 2 * width, dtype=torch.bfloat16)
    gate, up = gate_up.double().chunk(2, -1)
    y = kernels.gated_activate(gate_up.clone(), Activation.SILU)
    assert y.dtype == torch.bfloat16
    assert_near(y, gate / (1 + (-gate).exp()) * up)
    assert_near(kernels.activate(gate_up.clone(), Activation.RELU), gate_up.double().clamp(min=0))


def test_no_rows(kernels: Kernels) -> None:
    assert kernels.gated_activate(randn(0, 8), Activation.GELU).shape == (0, 4)
    assert kernels.activate(randn(0, 8), Activation.GELU).shape == (0, 8)
