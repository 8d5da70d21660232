import pytest

from trivium.scheduler.block_pool import BlockHash, BlockPool


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


def hash_of(text: str) -> BlockHash:
    return BlockHash(text.encode())


def test_a_named_block_is_found_while_it_is_free_until_it_is_reused() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.name(blocks[0], hash_of("a"))
    pool.free(blocks)
    assert pool.find(hash_of("a")) == blocks[0]
    pool.check_invariants([])
    pool.allocate(1)
    assert pool.find(hash_of("a")) == blocks[0], "blocks without contents are used first"
    pool.allocate(1)
    assert pool.find(hash_of("a")) is None and pool.num_evictions == 1


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.name(blocks[0], hash_of("a"))
    pool.share(blocks)
    pool.check_invariants([blocks, blocks])
    pool.free(blocks)
    assert pool.num_free_blocks == 1
    pool.free(blocks)
    assert pool.num_free_blocks == 2
    pool.share(blocks)
    pool.check_invariants([blocks])


def test_two_blocks_of_the_same_contents_keep_the_first_name() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    assert blocks is not None
    for block_id in blocks:
        pool.name(block_id, hash_of("a"))
    assert pool.find(hash_of("a")) == blocks[0]
    pool.check_invariants([blocks])


def test_forgotten_contents_are_not_found() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.name(blocks[0], hash_of("a"))
    pool.forget_all()
    assert pool.find(hash_of("a")) is None
    pool.check_invariants([blocks])
