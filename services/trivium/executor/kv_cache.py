"""The pool of KV blocks: one tensor, block-major, shared by self- and cross-attention of all requests.

Knows sizes and addresses. Which block belongs to whom is the scheduler's business.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from trivium.config import ExecutorConfig
from trivium.errors import ConfigurationError

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_SHARE = 0.2
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USAGE = Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True, slots=True)
class KVCacheShape:
    """What one token of one sequence costs."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def block_bytes(self, block_size: int) -> int:
        """Bytes of a block of float32 keys and values, all layers."""
        return self.num_layers * 2 * block_size * self.num_kv_heads * self.head_dim * 4


class KVCache:
    """Owns the pool [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim] and hands out views of it."""

    def __init__(self, shape: KVCacheShape, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # numpy maps zeroed memory without touching it: what is never used costs nothing. torch would write to it.
        self._pool = torch.from_numpy(
            np.zeros(
                (num_blocks, shape.num_layers, 2, block_size, shape.num_kv_heads, shape.head_dim), dtype=np.float32
            )
        )
        self._layers = tuple(
            (self._pool[:, layer, 0], self._pool[:, layer, 1]) for layer in range(shape.num_layers)
        )  # (key_cache, value_cache), each [num_blocks, block_size, num_kv_heads, head_dim]

    @property
    def num_bytes(self) -> int:
        return self._pool.nbytes

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, all layers: `pairs` are (from, to), and no block that is written is also read."""
        if pairs:
            sources, targets = zip(*pairs, strict=True)
            self._pool[list(targets)] = self._pool[list(sources)]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(key_cache, value_cache) of a layer, views [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self._layers[index]


def choose_num_blocks(
    config: ExecutorConfig, shape: KVCacheShape, max_model_len: int, max_encoder_len: int, *, available_bytes: int
) -> int:
    """How many blocks the pool gets, with one log line that says why.

    The default is a share of `available_bytes`, but never more than `max_num_seqs` requests of full length can use.
    Raises ConfigurationError if not even one request of full length would fit.
    """
    block_bytes = shape.block_bytes(config.block_size)
    blocks_per_request = _blocks_for(max_model_len, config) + _blocks_for(max_encoder_len, config)
    memory_bytes, origin = _memory_bytes(config, available_bytes)
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


def affordable_model_len(
    config: ExecutorConfig, shape: KVCacheShape, max_model_len: int, max_encoder_len: int, *, available_bytes: int
) -> int:
    """The longest context, up to `max_model_len`, of which the pool can hold one request, with a warning if it is less.

    For a context length that nobody asked for: a model made for 128k tokens must start on a laptop too.
    """
    memory_bytes, origin = _memory_bytes(config, available_bytes)
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


def _memory_bytes(config: ExecutorConfig, available_bytes: int) -> tuple[int, str]:
    """(bytes for the pool, where the number comes from)."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes, "--kv-cache-memory"
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
