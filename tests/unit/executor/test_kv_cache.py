"""How large the KV pool becomes, and that its views do not overlap."""

from __future__ import annotations

import logging

import pytest
import torch

from trivium.config import ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor.kv_cache import (
    KVCache,
    KVCacheShape,
    affordable_model_len,
    available_memory_bytes,
    choose_num_blocks,
)

SHAPE = KVCacheShape(num_layers=3, num_kv_heads=2, head_dim=8)
BLOCK_BYTES = 3 * 2 * 4 * 2 * 8 * 4


def make_config(kv_cache_memory_bytes: int | None) -> ExecutorConfig:
    return ExecutorConfig(
        model="m", served_model_name="m", block_size=4, max_num_seqs=5, kv_cache_memory_bytes=kv_cache_memory_bytes
    )


def test_a_given_size_is_used_to_the_last_whole_block(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_num_blocks(make_config(BLOCK_BYTES * 100 + 1), SHAPE, 40, 0, available_bytes=0) == 100
    assert "KV cache: 400 tokens in 100 blocks" in caplog.text
    assert "--kv-cache-memory" in caplog.text


def test_the_default_is_a_share_of_free_memory() -> None:
    assert choose_num_blocks(make_config(None), SHAPE, 400, 0, available_bytes=BLOCK_BYTES * 1000) == 200


def test_the_default_is_no_more_than_all_requests_can_use() -> None:
    assert choose_num_blocks(make_config(None), SHAPE, 9, 5, available_bytes=BLOCK_BYTES * 10**6) == 5 * (3 + 2)


def test_a_pool_that_cannot_hold_one_request_is_refused_with_both_numbers_and_the_flags() -> None:
    with pytest.raises(ConfigurationError, match=r"holds 36 tokens .* needs 44 .* --kv-cache-memory or lower"):
        choose_num_blocks(make_config(BLOCK_BYTES * 9), SHAPE, 40, 2, available_bytes=0)


def test_layers_are_disjoint_views_of_one_block_major_pool() -> None:
    cache = KVCache(SHAPE, num_blocks=3, block_size=4)
    views = [view for layer in range(3) for view in cache.layer(layer)]
    for index, view in enumerate(views):
        view.fill_(index)
    assert [view.unique().tolist() for view in views] == [[index] for index in range(6)]
    assert {view.untyped_storage().data_ptr() for view in views} == {views[0].untyped_storage().data_ptr()}
    assert views[0].shape == torch.Size((3, 4, 2, 8))
    assert views[0].stride(0) * 4 == SHAPE.block_bytes(4)  # a block's layers lie together


def test_free_memory_is_positive() -> None:
    assert available_memory_bytes() > 0


def test_a_context_that_nobody_asked_for_shrinks_to_what_the_pool_holds(caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(10 * BLOCK_BYTES)
    assert affordable_model_len(config, SHAPE, 1000, 8, available_bytes=0) == 4 * (10 - 2)
    assert "from the model's 1000 to 32" in caplog.text
    assert affordable_model_len(config, SHAPE, 30, 8, available_bytes=0) == 30
