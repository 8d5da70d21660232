"""The pool of KV blocks: one tensor, block-major, shared by self- and cross-attention of all requests.

Beside it the host pool, of blocks of the same shape, which preempted requests are swapped to. Knows sizes and
addresses. Which block belongs to whom is the scheduler's business.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from trivium.config import DEFAULT_GPU_MEMORY_UTILIZATION, ExecutorConfig
from trivium.errors import ConfigurationError
from trivium.executor import transfers

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_SHARE = 0.2
CPU = torch.device("cpu")
_CACHE_LINE_BYTES = 64
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USAGE = Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True, slots=True)
class KVCacheShape:
    """What one token of one sequence costs. dtype: of keys and values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    def block_bytes(self, block_size: int) -> int:
        """Bytes of a block of keys and values, all layers."""
        return self.num_layers * 2 * block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


Pairs = Sequence[tuple[int, int]]


class KVCache:
    """Owns the pool [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim] and hands out views of it.

    The host pool of `num_host_blocks` blocks takes memory from the first swap on. In the pairs of one call no block
    is written twice.
    """

    def __init__(
        self,
        shape: KVCacheShape,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        self._host_pool: Tensor | None = None  # [num_host_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]
        sizes = (num_blocks, shape.num_layers, 2, block_size, shape.num_kv_heads, shape.head_dim)
        if device.type == "cpu" and shape.dtype is torch.float32:
            self._pool = _untouched_zeros(sizes)
        else:
            self._pool = torch.zeros(sizes, dtype=shape.dtype, device=device)
        self._layers = tuple(
            (self._pool[:, layer, 0], self._pool[:, layer, 1]) for layer in range(shape.num_layers)
        )  # (key_cache, value_cache), each [num_blocks, block_size, num_kv_heads, head_dim]

    @property
    def num_bytes(self) -> int:
        return self._pool.nbytes

    @property
    def num_host_bytes(self) -> int:
        """Host memory taken for swaps so far."""
        return 0 if self._host_pool is None else self._host_pool.nbytes

    def copy_blocks(self, pairs: Pairs) -> None:
        """Copy each (from, to): all are read before one is written."""
        if pairs:
            _copy_blocks(self._pool, self._pool, pairs)

    def swap_out(self, pairs: Pairs) -> None:
        """Copy each (block, host block) to host memory."""
        if pairs:
            _copy_blocks(self._pool, self._host(), pairs)

    def swap_in(self, pairs: Pairs) -> None:
        """Copy each (block, host block) from host memory."""
        if pairs:
            _copy_blocks(self._host(), self._pool, [(host_block, block) for block, host_block in pairs])

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(key_cache, value_cache) of a layer, views [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self._layers[index]

    def _host(self) -> Tensor:
        if self._host_pool is None:
            shape = (self.num_host_blocks, *self._pool.shape[1:])
            # Pinned, or the copies from and to a GPU would wait for each other.
            self._host_pool = torch.empty(shape, dtype=self._pool.dtype, pin_memory=self._pool.is_cuda)
        return self._host_pool


def _untouched_zeros(sizes: tuple[int, ...]) -> Tensor:
    """float32, at a cache line: vectors across two lines made decode attention a quarter slower.

    numpy maps zeroed memory without touching it: what is never used costs nothing. torch would write to it.
    """
    num_bytes = math.prod(sizes) * torch.float32.itemsize
    memory = np.zeros(num_bytes + _CACHE_LINE_BYTES, np.uint8)
    aligned = memory[-memory.ctypes.data % _CACHE_LINE_BYTES :][:num_bytes]
    return torch.from_numpy(aligned).view(torch.float32).view(sizes)


def _copy_blocks(source: Tensor, target: Tensor, pairs: Pairs) -> None:
    """Copy block `from` of `source` to block `to` of `target`, for every pair (from, to).

    Within one memory that is one gather and one scatter. Between two it is one transfer per block, which is contiguous,
    queued on the current stream: later work there sees its result.
    """
    if source.device != target.device:
        for from_block, to_block in pairs:
            target[to_block].copy_(source[from_block], non_blocking=True)
        return
    from_blocks, to_blocks = transfers.upload(np.array(pairs, np.int64), source.device).unbind(1)
    target.flatten(1).index_copy_(0, to_blocks, source.flatten(1).index_select(0, from_blocks))


def choose_num_blocks(
    config: ExecutorConfig,
    shape: KVCacheShape,
    max_model_len: int,
    max_encoder_len: int,
    *,
    available_bytes: int,
    device: torch.device = CPU,
) -> int:
    """How many blocks the pool gets, with one log line that says why.

    The default is a share of `available_bytes`, on a GPU what is left of its share for the process; but never more
    than `max_num_seqs` requests of full length can use. Raises ConfigurationError if not even one would fit.
    """
    if config.gpu_memory_utilization is not None and device.type != "cuda":
        logger.info("gpu_memory_utilization has no effect on a CPU: --kv-cache-memory decides there")
    block_bytes = shape.block_bytes(config.block_size)
    blocks_per_request = _blocks_for(max_model_len, config) + _blocks_for(max_encoder_len, config)
    memory_bytes, origin = _memory_bytes(config, available_bytes, device)
    num_blocks = memory_bytes // block_bytes
    if config.kv_cache_memory_bytes is None and num_blocks > blocks_per_request * config.max_num_seqs:
        num_blocks = blocks_per_request * config.max_num_seqs
        origin = f"all that {config.max_num_seqs} requests of full length can use"
    if num_blocks < blocks_per_request:
        raise ConfigurationError(
            f"the KV cache holds {num_blocks * config.block_size} tokens ({num_blocks * block_bytes} bytes, from "
            f"{origin}), but one request of full length needs {blocks_per_request * config.block_size} "
            f"({blocks_per_request * block_bytes} bytes): raise --kv-cache-memory or lower --max-model-len"
        )
    logger.info(
        "KV cache: %d tokens in %d blocks, %.1f MiB (%s)",
        num_blocks * config.block_size,
        num_blocks,
        num_blocks * block_bytes / 2**20,
        origin,
    )
    return num_blocks


def choose_num_host_blocks(config: ExecutorConfig, shape: KVCacheShape, *, available_bytes: int) -> int:
    """How many blocks of host memory preempted requests may be swapped to, with a log line if there are any.

    Raises ConfigurationError if that is more memory than is free.
    """
    swap_bytes = int(config.swap_space_gib * 2**30)
    if not swap_bytes:
        return 0
    if swap_bytes > available_bytes:
        raise ConfigurationError(
            f"--swap-space is {config.swap_space_gib:g} GiB, but only {available_bytes / 2**30:.1f} GiB are free"
        )
    num_host_blocks = swap_bytes // shape.block_bytes(config.block_size)
    logger.info(
        "swap space: %d tokens in %d host blocks, %.1f MiB (--swap-space)",
        num_host_blocks * config.block_size,
        num_host_blocks,
        swap_bytes / 2**20,
    )
    return num_host_blocks


def affordable_model_len(
    config: ExecutorConfig,
    shape: KVCacheShape,
    max_model_len: int,
    max_encoder_len: int,
    *,
    available_bytes: int,
    device: torch.device = CPU,
) -> int:
    """The longest context, up to `max_model_len`, of which the pool can hold one request, with a warning if it is less.

    For a context length that nobody asked for: a model made for 128k tokens must start on a laptop too.
    """
    memory_bytes, origin = _memory_bytes(config, available_bytes, device)
    num_blocks = memory_bytes // shape.block_bytes(config.block_size) - _blocks_for(max_encoder_len, config)
    affordable = num_blocks * config.block_size
    if affordable >= max_model_len or affordable < config.block_size:
        return max_model_len
    logger.warning(
        "max_model_len adjusted from the model's %d to %d, which is what the KV cache holds (%s); "
        "--kv-cache-memory gives it more",
        max_model_len,
        affordable,
        origin,
    )
    return affordable


def _memory_bytes(config: ExecutorConfig, available_bytes: int, device: torch.device) -> tuple[int, str]:
    """(bytes for the pool, where the number comes from). The weights must be loaded already."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes, "--kv-cache-memory"
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        utilization = config.gpu_memory_utilization or DEFAULT_GPU_MEMORY_UTILIZATION
        origin = f"{utilization:.0%} of {total_bytes / 2**30:.1f} GiB GPU memory, less what is in use"
        return max(0, int(total_bytes * utilization) - (total_bytes - free_bytes)), origin
    origin = f"{DEFAULT_MEMORY_SHARE:.0%} of {available_bytes / 2**30:.1f} GiB free memory"
    return int(available_bytes * DEFAULT_MEMORY_SHARE), origin


def available_memory_bytes() -> int:
    """Memory this process may still take: what the machine has free, within the limit of its control group."""
    available = int(psutil.virtual_memory().available)
    try:
        limit, usage = _CGROUP_LIMIT.read_text().strip(), int(_CGROUP_USAGE.read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - usage))


def _blocks_for(num_tokens: int, config: ExecutorConfig) -> int:
    return -(-num_tokens // config.block_size)
