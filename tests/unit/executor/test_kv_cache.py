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
    choose_num_host_blocks,
)

SHAPE = KVCacheShape(num_layers=3, num_kv_heads=2, head_dim=8)
BLOCK_BYTES = 3 * 2 * 4 * 2 * 8 * 4


def make_config(kv_cache_memory_bytes: int | None, **settings: float) -> ExecutorConfig:
    return ExecutorConfig(
        model="m",
        served_model_name="m",
        block_size=4,
        max_num_seqs=5,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        **settings,  # type: ignore[arg-type]
    )


def filled_cache(num_blocks: int, num_host_blocks: int) -> tuple[KVCache, torch.Tensor]:
    """A cache with random contents, and a copy of them [num_blocks, ...] for reference."""
    cache = KVCache(SHAPE, num_blocks, block_size=4, num_host_blocks=num_host_blocks)
    for layer in range(3):
        for view in cache.layer(layer):
            view.normal_()
    return cache, contents(cache)


def contents(cache: KVCache) -> torch.Tensor:
    return torch.stack([torch.stack(cache.layer(layer), 1) for layer in range(3)], 1)


def test_rows_of_heads_begin_at_cache_lines() -> None:
    shape = KVCacheShape(num_layers=2, num_kv_heads=3, head_dim=64)
    caches = [KVCache(shape, num_blocks, block_size=4) for num_blocks in (1, 3, 500)]
    for cache in caches:
        key_cache, value_cache = cache.layer(1)
        assert key_cache.data_ptr() % 64 == value_cache.data_ptr() % 64 == 0
        assert not key_cache.any() and not value_cache.any()


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


def test_copies_are_exact_and_read_everything_before_they_write() -> None:
    cache, before = filled_cache(6, 0)
    cache.copy_blocks([(0, 1), (1, 2), (2, 0), (0, 5)])
    assert torch.equal(contents(cache), before[[2, 0, 1, 3, 4, 0]])


def test_what_is_swapped_out_comes_back_bit_by_bit_in_other_blocks() -> None:
    cache, before = filled_cache(6, 4)
    assert cache.num_host_bytes == 0, "no swap, no memory"
    cache.swap_out([(5, 0), (2, 3), (5, 1)])
    assert cache.num_host_bytes == 4 * SHAPE.block_bytes(4)
    assert torch.equal(contents(cache), before), "reading changes nothing"
    for layer in range(3):
        for view in cache.layer(layer):
            view.fill_(7.0)
    cache.swap_in([(0, 3), (4, 1)])
    after = contents(cache)
    assert torch.equal(after[[0, 4]], before[[2, 5]])
    assert (after[[1, 2, 3, 5]] == 7.0).all()


def test_the_swap_space_is_a_number_of_whole_blocks(caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(None, swap_space_gib=(BLOCK_BYTES * 10 + 1) / 2**30)
    with caplog.at_level(logging.INFO):
        assert choose_num_host_blocks(config, SHAPE, available_bytes=2**30) == 10
    assert "swap space: 40 tokens in 10 host blocks" in caplog.text
    assert choose_num_host_blocks(make_config(None), SHAPE, available_bytes=0) == 0


def test_more_swap_space_than_free_memory_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigurationError, match=r"--swap-space is 3.5 GiB, but only 2.0 GiB"):
        choose_num_host_blocks(make_config(None, swap_space_gib=3.5), SHAPE, available_bytes=2**31)


def test_on_a_gpu_the_pool_gets_its_share_of_the_memory_less_what_is_in_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    total, free = 1000 * BLOCK_BYTES, 700 * BLOCK_BYTES
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    gpu = torch.device("cuda", 0)
    with caplog.at_level(logging.INFO):
        assert choose_num_blocks(make_config(None), SHAPE, 800, 0, available_bytes=0, device=gpu) == 600
    assert "90% of" in caplog.text and "less what is in use" in caplog.text
    config = make_config(None, gpu_memory_utilization=0.5)
    assert choose_num_blocks(config, SHAPE, 800, 0, available_bytes=0, device=gpu) == 200


def test_on_a_cpu_gpu_memory_utilization_changes_nothing_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(None, gpu_memory_utilization=0.5)
    with caplog.at_level(logging.INFO):
        assert choose_num_blocks(config, SHAPE, 400, 0, available_bytes=BLOCK_BYTES * 1000) == 200
    assert "gpu_memory_utilization has no effect on a CPU: --kv-cache-memory decides there" in caplog.text


def test_free_memory_is_positive() -> None:
    assert available_memory_bytes() > 0


def test_a_context_that_nobody_asked_for_shrinks_to_what_the_pool_holds(caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(10 * BLOCK_BYTES)
    assert affordable_model_len(config, SHAPE, 1000, 8, available_bytes=0) == 4 * (10 - 2)
    assert "from the model's 1000 to 32" in caplog.text
    assert affordable_model_len(config, SHAPE, 30, 8, available_bytes=0) == 30
