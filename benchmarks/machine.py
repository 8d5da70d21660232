"""What the machine can do, measured in the same run: no step can be faster than its weights or its products allow."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from checkpoints import Shape

_READ_BYTES = 2**28
_MATRIX = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """With the threads of the run: bytes read per second, float32 operations per second."""

    bytes_per_s: float
    flops_per_s: float

    def step_seconds(self, shape: Shape, *, num_rows: int, context: int, weight_bytes: int) -> float:
        """The least time of a decode step of a decoder-only model, whatever it computes besides the layers' products.

        context: tokens of each row whose keys and values, in float32, are read. weight_bytes: of each weight.
        """
        sizes = Sizes.of(shape)
        num_bytes = sizes.num_weights * weight_bytes + num_rows * context * sizes.cache_bytes
        return max(num_bytes / self.bytes_per_s, 2 * sizes.num_weights * num_rows / self.flops_per_s)

    def best(self, other: Limits) -> Limits:
        """What either of two measurements has reached."""
        return Limits(max(self.bytes_per_s, other.bytes_per_s), max(self.flops_per_s, other.flops_per_s))

    def __str__(self) -> str:
        return f"memory read {self.bytes_per_s / 1e9:.1f} GB/s, float32 product {self.flops_per_s / 1e9:.0f} GFLOP/s"


def measure_limits(num_threads: int, runs: int = 5) -> Limits:
    """The best of `runs`."""
    torch.set_num_threads(num_threads)
    data, matrix = torch.ones(_READ_BYTES // 4), torch.randn(_MATRIX, _MATRIX)
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix, _MATRIX)
    read, product = [], []
    for _ in range(runs):
        begin = time.perf_counter()
        data.sum()
        read.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        torch.ops.mkldnn._linear_pointwise(matrix, packed, None, "none", [], "")
        product.append(time.perf_counter() - begin)
    return Limits(_READ_BYTES / min(read), 2 * _MATRIX**3 / min(product))


@dataclass(frozen=True, slots=True)
class Sizes:
    """num_weights: that a token is multiplied with. cache_bytes: keys and values of a token, all layers, float32."""

    num_weights: int
    cache_bytes: int

    @classmethod
    def of(cls, shape: Shape) -> Sizes:
        config = shape.config
        hidden, heads, kv_heads, num_layers = (
            int(config[name])
            for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
        )
        head_dim = int(config.get("head_dim", hidden // heads))
        layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * int(config["intermediate_size"])
        return cls(num_layers * layer + hidden * shape.vocab_size, num_layers * 2 * kv_heads * head_dim * 4)
