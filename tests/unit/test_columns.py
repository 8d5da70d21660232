import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium import columns


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_pack_and_unpack_are_inverse(values: list[int]) -> None:
    data = columns.pack(values)
    assert len(data) == 4 * len(values)
    assert columns.unpack(data) == values


def test_columns_are_little_endian() -> None:
    assert columns.pack([1, 2]) == b"\x01\x00\x00\x00\x02\x00\x00\x00"


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple)))
def test_ragged_rows_survive(rows: list[tuple[int, ...]]) -> None:
    assert columns.unpack_ragged(*columns.pack_ragged(rows)) == rows


def test_a_value_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(OverflowError):
        columns.pack([2**32])
    with pytest.raises(OverflowError):
        columns.pack([-1])


def test_a_broken_length_is_an_error() -> None:
    with pytest.raises(columns.ColumnError, match="no multiple of 4"):
        columns.unpack(b"123")


def test_counts_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(columns.ColumnError, match="add up to 3"):
        columns.unpack_ragged(columns.pack([1, 2]), columns.pack([5, 6]))


def test_columns_of_different_length_are_named() -> None:
    with pytest.raises(columns.ColumnError, match="'b': 2"):
        columns.check_same_length(a=[1], b=[1, 2])
