"""A recording does with other numbers what its operators would do with them, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernel_checks import TRITON, randn
from trivium_kernels.activation import Activation
from trivium_kernels.cpu import (
    NativeRecorder,
    PackedWeight,
    WeightType,
    gated_activate,
    layer_norm,
    paged_attention,
    plan_paged_attention,
    reshape_and_cache,
    rms_norm,
    rotary_embedding,
    rotate_and_cache,
)
from trivium_kernels.rotate_and_cache import HeadNorms

pytestmark = pytest.mark.skipif(TRITON, reason="of the C++ kernels")

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 8, 4
HIDDEN = HEADS * DIM


class Layers:
    """Every operator in C++, and functions of torch of all kinds between them. caches: what the last run wrote."""

    def __init__(self) -> None:
        self.qkv = PackedWeight(randn((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), randn(64), WeightType.FLOAT32)
        self.output = PackedWeight(randn(HIDDEN, HIDDEN), None, WeightType.BFLOAT16)
        self.gate_up = PackedWeight(randn(96, HIDDEN), None, WeightType.FLOAT32)
        self.down = PackedWeight(randn(HIDDEN, 48), None, WeightType.FLOAT32)
        self.norm, self.bias = randn(HIDDEN), randn(HIDDEN)
        self.table, self.angles = randn(50, HIDDEN), randn(64, DIM)
        self.heads = HeadNorms(randn(DIM), randn(DIM), 1e-6)
        self.caches = torch.zeros(2, 2, 12, BLOCK, KV_HEADS, DIM)  # [layer, keys or values, block, ...]

    def __call__(self, ids: Tensor, positions: Tensor, slots: Tensor, tables: Tensor, lens: Tensor) -> Tensor:
        cos, sin = self.angles[positions].cos(), torch.nn.functional.embedding(positions, self.angles).sin()
        plan = plan_paged_attention(
            tables, lens, torch.arange(len(ids) + 1), block_size=BLOCK, causal=False
        )  # rows with the same blocks are merged, so that the number of segments changes
        hidden = torch.nn.functional.embedding(ids, self.table) * 1.5
        for layer, (keys, values) in enumerate(self.caches):
            qkv = self.qkv(rms_norm(hidden, self.norm, 1e-6)).view(len(ids), HEADS + 2 * KV_HEADS, DIM)
            if layer:
                query = rotate_and_cache(qkv, (cos, sin), keys, values, slots, self.heads)
            else:
                query = rotary_embedding(qkv[:, :HEADS], cos, sin)
                reshape_and_cache(qkv[:, HEADS:-KV_HEADS], qkv[:, -KV_HEADS:], keys, values, slots)
            attended = paged_attention(query, keys, values, plan, scale=0.3)
            hidden = self.output(attended.flatten(1), hidden)
            hidden.add_(0.25).clamp_(-9, 9)
            hidden[:, 0] = hidden[:, 1] + hidden.mean(dim=1)
            normed = layer_norm(hidden, self.norm, self.bias, 1e-5)
            hidden = self.down(gated_activate(self.gate_up(normed), Activation.SILU), hidden)
        most, _ = hidden.max(dim=1, keepdim=True)
        return hidden - most


def step(number: int, num_rows: int) -> tuple[Tensor, ...]:
    """ids, positions, slots, tables, lens: others in every step, some rows with the blocks of their neighbour."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 50, (num_rows,), generator=generator)
    lens = torch.randint(1, 9, (num_rows,), generator=generator)
    blocks = torch.randperm(12, generator=generator)[: 2 * num_rows].view(num_rows, 2).int()
    if number % 2:
        blocks[1], lens[1] = blocks[0], lens[0]
    slots = blocks[:, 0].long() * BLOCK + number % BLOCK
    return ids, lens + 7, slots, blocks, lens


def test_replays_do_what_the_operators_do() -> None:
    layers, recorder = Layers(), NativeRecorder()
    sizes = (5, 3)
    inputs = {size: step(0, size) for size in sizes}
    recordings = {size: recorder.record(lambda size=size: layers(*inputs[size])) for size in sizes}
    for number in range(1, 9):
        size = sizes[number % 2]
        before = layers.caches.clone()
        for tensor, other in zip(inputs[size], step(number, size), strict=True):
            tensor.copy_(other)
        found = recordings[size].replay().clone()
        caches = layers.caches.clone()
        layers.caches.copy_(before)
        assert torch.equal(found, layers(*inputs[size]))
        assert torch.equal(caches, layers.caches)


def test_recordings_share_their_memory() -> None:
    layers, recorder = Layers(), NativeRecorder()
    inputs = step(0, 5)
    first = recorder.record(lambda: layers(*inputs))
    num_blocks = recorder._memory.num_kept
    assert 3 < num_blocks < 12, "temporary tensors have given their memory to later ones"
    del first
    second = recorder.record(lambda: layers(*inputs))
    assert recorder._memory.num_kept <= num_blocks + 2
    del second


@pytest.mark.parametrize(
    "read", [lambda x: x.tolist(), lambda x: x[0].item(), lambda x: bool(x[0] > 0), lambda x: x.numpy()]
)
def test_a_step_that_reads_numbers_is_not_recorded(read: Callable[[Tensor], object]) -> None:
    given = randn(3)

    def work() -> Tensor:
        read(given)
        return given + 1

    with pytest.raises(RuntimeError, match="depends on the numbers of its tensors"):
        NativeRecorder().record(work)
    assert torch.equal(NativeRecorder().record(lambda: given + 1).replay(), given + 1), "the recorder has recovered"


def test_nothing_is_recorded_beside_a_recording() -> None:
    """Outside of it, and in what is made for replays."""
    recorder, given = NativeRecorder(), randn(4, 32)
    weight, norm = PackedWeight(randn(8, 32), None, WeightType.FLOAT32), randn(32)
    recording = recorder.record(lambda: weight(given))
    other = weight(rms_norm(given, norm, 1e-6)).clone()
    given.mul_(2.0)
    assert torch.equal(recording.replay(), weight(given))
    assert not torch.equal(other, weight(given))
