import pytest

from trivium.scheduler.block_pool import BlockPool


def test_allocate_gives_distinct_blocks_and_none_when_there_are_too_few() -> None:
    pool = BlockPool(5)
    first = pool.allocate(3)
    assert first is not None and len(set(first)) == 3
    assert pool.allocate(3) is None
    assert pool.num_free_blocks == 2
    pool.check_invariants([first])


def test_freed_blocks_can_be_allocated_again() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    assert blocks is not None
    pool.free(blocks)
    assert pool.num_free_blocks == 3
    again = pool.allocate(3)
    assert again is not None and set(again) == {0, 1, 2}


def test_freeing_a_block_twice_is_caught() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_check_invariants_finds_a_leaked_block() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="wrong ref_count"):
        pool.check_invariants([])
