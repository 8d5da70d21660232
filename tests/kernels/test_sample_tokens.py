"""sample_tokens against the executor's sampler, which draws on a CPU, and the random numbers against its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernel_checks import TRITON, randn
from trivium.executor.sampler import DrawLimits, RowSampling, sample_rows, uniform_numbers
from trivium_kernels import reference
from trivium_kernels.dispatch import Kernels
from trivium_kernels.reference.sample_tokens import uniform_numbers as torch_uniform_numbers
from trivium_kernels.sample_tokens import TokenSampling

KEYS = np.random.default_rng(0).integers(-(2**63), 2**63, (3, 500), np.int64, endpoint=False)
KEYS[:, :3] = [[0, 1, -1], [0, 0, 2**63 - 1], [0, 1, 2**62]]


def make_sampling(num_rows: int, *, start: int = 0, **columns: Any) -> TokenSampling:
    """Neutral but for `columns`, which are numbers for all rows or lists; position `start` and those after it."""
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7, "choice_index": 1}
    tensors = {
        name: torch.tensor(columns.get(name, value)).broadcast_to((num_rows,)).contiguous()
        for name, value in neutral.items()
    }
    return TokenSampling(**tensors, position=torch.arange(start, start + num_rows))


def by_executor(logits: Tensor, sampling: TokenSampling) -> Tensor:
    uniform = uniform_numbers(*(getattr(sampling, name).numpy() for name in ("seed", "choice_index", "position")))
    nothing = torch.zeros(len(logits))
    limits = DrawLimits(sampling.top_k, sampling.top_p, nothing.double(), torch.from_numpy(uniform))
    is_greedy = sampling.temperature == 0
    temperature = torch.where(is_greedy, 1.0, sampling.temperature)
    drawn = sample_rows(logits.clone(), RowSampling(temperature, sampling.min_p, nothing.bool(), limits, {}))
    return torch.where(is_greedy, logits.argmax(-1), drawn)


def test_the_random_numbers_of_plain_torch_are_those_of_the_executor() -> None:
    found = torch_uniform_numbers(*(torch.from_numpy(keys) for keys in KEYS))
    assert found.numpy().tobytes() == uniform_numbers(*KEYS).tobytes()


@pytest.mark.skipif(not TRITON, reason="it needs the Triton source")
def test_the_random_numbers_of_triton_are_those_of_the_executor() -> None:
    from uniform_kernel import uniforms  # Triton is imported only where it is interpreted

    found = uniforms(*(torch.from_numpy(keys) for keys in KEYS))
    assert found.numpy().tobytes() == uniform_numbers(*KEYS).tobytes()


@pytest.mark.parametrize("vocab_size", [5, 2100])
@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.8},
        {"top_k": 50, "top_p": 0.9},
        {"min_p": 0.05, "temperature": 1.7},
        {"top_k": 2000, "top_p": 0.999, "temperature": 30.0},  # flat: candidates fill more than one tile
        {"top_p": 0.0},
        {"temperature": [0.0, 0.6, 0.0, 2.0, 1.0], "top_k": [0, 0, 9, 9, 0], "top_p": [1.0, 0.7, 0.7, 0.7, 1.0]},
    ],
)
def test_the_same_tokens_as_the_executor(kernels: Kernels, columns: dict[str, Any], vocab_size: int) -> None:
    logits = 3 * randn(5, vocab_size)
    sampling = make_sampling(5, start=100, **columns)
    assert kernels.sample_tokens(logits, sampling).tolist() == by_executor(logits, sampling).tolist()


def test_equal_weights_are_in_the_order_of_the_vocabulary(kernels: Kernels) -> None:
    """Whole logits, a dozen values for 1300 tokens: every limit falls among equals."""
    logits = (2 * randn(3, 1300)).round()
    for columns in ({"top_k": 40}, {"top_p": 0.5}, {"top_k": 100, "top_p": 0.6, "min_p": 0.01}, {}):
        sampling = make_sampling(3, **columns)
        found = kernels.sample_tokens(logits, sampling)
        assert found.tolist() == reference.sample_tokens(logits, sampling).tolist()


def test_the_first_of_the_largest_logits_is_greedy(kernels: Kernels) -> None:
    logits = torch.zeros(2, 2100)
    logits[1, [1030, 1029, 2099]] = 5.0
    assert kernels.sample_tokens(logits, make_sampling(2, temperature=0.0)).tolist() == [0, 1029]


def test_only_allowed_tokens_are_drawn(kernels: Kernels) -> None:
    logits = torch.full((6, 1100), -torch.inf)
    logits[:, [3, 1050]] = 0.0
    for columns in ({}, {"top_k": 5, "top_p": 0.9}):
        drawn = kernels.sample_tokens(logits, make_sampling(6, **columns)).tolist()
        assert set(drawn) == {3, 1050}
    everything_banned = torch.full((1, 9), -torch.inf)
    assert kernels.sample_tokens(everything_banned, make_sampling(1, top_k=2)).tolist() == [0]


def test_a_row_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    logits = randn(3, 1100)
    sampling = make_sampling(3, top_k=[0, 5, 0], top_p=[1.0, 0.9, 0.5])
    together = kernels.sample_tokens(logits, sampling).tolist()
    alone = [
        int(
            kernels.sample_tokens(
                logits[row : row + 1],
                make_sampling(1, start=row, top_k=int(sampling.top_k[row]), top_p=float(sampling.top_p[row])),
            )
        )
        for row in range(3)
    ]
    assert alone == together


def test_no_rows(kernels: Kernels) -> None:
    assert kernels.sample_tokens(randn(0, 9), make_sampling(0)).shape == (0,)
