"""Chunked search finds what torch finds."""

from __future__ import annotations

import pytest
import torch

from trivium.executor.largest import argmax, top_k

SIZES = [5, 1000, 1024, 1025, 4097, 58101]


def scores_of(size: int, *, num_values: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    if num_values is None:
        return torch.randn((7, size), generator=generator)
    return torch.randint(num_values, (7, size), generator=generator).float()


@pytest.mark.parametrize("size", SIZES)
def test_argmax_is_the_first_of_the_largest(size: int) -> None:
    for scores in (scores_of(size), scores_of(size, num_values=3), torch.full((2, size), -torch.inf)):
        largest = scores.amax(dim=-1, keepdim=True)
        expected = [row.tolist().index(value) for row, value in zip(scores, largest[:, 0].tolist(), strict=True)]
        assert argmax(scores).tolist() == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_argmax_finds_the_largest_anywhere(size: int, place: float) -> None:
    scores = scores_of(size)
    index = int((size - 1) * place)
    scores[3, index] = 100.0
    assert argmax(scores)[3] == index


@pytest.mark.parametrize("size", SIZES)
def test_argmax_takes_what_is_not_a_number_as_torch_does(size: int) -> None:
    for index in (1, size - 1):
        scores = scores_of(size)
        scores[2, index] = torch.nan
        assert argmax(scores).equal(scores.argmax(dim=-1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 4, 8])
def test_top_k_are_the_k_largest_in_order(size: int, k: int) -> None:
    if k > size:
        k = size
    scores = scores_of(size)
    expected = scores.topk(k, dim=-1)
    values, indices = top_k(scores, k)
    assert values.equal(expected.values)
    assert indices.equal(expected.indices)


@pytest.mark.parametrize("size", SIZES)
def test_top_k_of_equals_has_different_places(size: int) -> None:
    k = min(8, size)
    scores = scores_of(size, num_values=2)
    values, indices = top_k(scores, k)
    assert values.equal(scores.topk(k, dim=-1).values)
    assert scores.gather(1, indices).equal(values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_top_k_copes_with_rows_of_minus_infinity() -> None:
    scores = torch.full((3, 4099), -torch.inf)
    scores[1, 4098] = 0.0
    values, indices = top_k(scores, 4)
    assert values[1, 0] == 0.0
    assert indices[1, 0] == 4098
    assert all(len(set(row)) == 4 for row in indices.tolist())
