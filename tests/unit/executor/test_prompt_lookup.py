"""What is guessed, and that guessing changes nothing but the number of steps."""

from __future__ import annotations

import numpy as np
import pytest

from trivium.executor.prompt_lookup import find_draft


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("sources", "max_tokens", "expected"),
    [
        ([ids(5, 6, 7, 8, 9), ids(1, 6, 7)], 2, [8, 9]),  # the source goes on after the same two tokens
        ([ids(5, 6, 7, 8, 9), ids(1, 6, 7)], 9, [8, 9]),
        ([ids(5, 6, 7, 8), ids(7, 3, 6, 7, 4, 6, 7)], 3, [4, 6, 7]),  # the own text before the source, the last place
        ([ids(2, 3, 4, 30), ids(9, 3, 4, 40, 2, 3, 4)], 1, [30]),  # a longer end before a nearer place
        ([ids(1, 2, 3), ids(7, 8)], 4, []),
        ([ids(1, 2, 8), ids(7, 8)], 4, []),  # nothing behind it
        ([ids(1, 2, 1, 2)], 4, [1, 2]),
        ([ids(4)], 4, []),
        ([ids(1, 8, 5), ids(7, 8)], 0, []),
    ],
)
def test_what_followed_before_is_guessed_again(sources: list[np.ndarray], max_tokens: int, expected: list[int]) -> None:
    assert find_draft(sources, max_tokens).tolist() == expected
