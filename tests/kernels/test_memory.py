"""Memory of large results is taken again, and never while a tensor has it."""

from __future__ import annotations

import threading

import pytest
import torch

from kernel_checks import TRITON, randn
from trivium_kernels.cpu import PackedWeight, WeightType
from trivium_kernels.cpu.memory import LARGE_BYTES, LentMemory, empty, lent_from

pytestmark = pytest.mark.skipif(TRITON, reason="of the C++ kernels")

ROWS = LARGE_BYTES // 4


def test_memory_comes_back_with_the_last_tensor_that_has_it() -> None:
    memory = LentMemory()
    first = memory.empty((8, 4), torch.float32)
    address, part = first.data_ptr(), first.view(4, 8)[1:]
    del first
    other = memory.empty((8, 4), torch.float32)
    assert other.data_ptr() != address, "a view still has the first one's memory"
    del part
    third = memory.empty((4,), torch.int64)
    assert third.data_ptr() == address and third.dtype is torch.int64
    assert (other.shape, memory.num_kept) == ((8, 4), 0)
    assert memory.empty((0, 3), torch.float32).shape == (0, 3)


def test_the_smallest_that_is_large_enough_is_taken() -> None:
    memory = LentMemory()
    tensors = [memory.empty((size,), torch.uint8) for size in (1000, 300, 500)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert all(address % 64 == 0 for address in addresses)
    tensors.clear()
    assert [memory.empty((size,), torch.uint8).data_ptr() for size in (400, 390, 100)] == [addresses[2]] * 2 + [
        addresses[1]
    ]


def test_no_more_is_kept_than_allowed() -> None:
    memory = LentMemory(max_kept_bytes=1000)
    tensors = [memory.empty((400,), torch.uint8) for _ in range(4)]
    tensors.clear()
    assert memory.num_kept == 2


def test_large_results_of_operators_are_lent_and_each_thread_has_its_own() -> None:
    weight = PackedWeight(randn(64, 16), None, WeightType.FLOAT32)
    x = randn(ROWS // 64, 16)
    expected = weight(x).clone()
    address = weight(x).data_ptr()
    assert weight(x).data_ptr() == address
    kept, again = weight(x), weight(x)
    assert kept.data_ptr() != again.data_ptr()
    assert torch.equal(kept, expected) and torch.equal(again, expected)
    elsewhere: list[int] = []
    thread = threading.Thread(target=lambda: elsewhere.append(weight(x).data_ptr()))
    thread.start()
    thread.join()
    del kept, again
    assert elsewhere[0] not in (weight(x).data_ptr(), address)


def test_what_is_lent_from_elsewhere() -> None:
    memory = LentMemory()
    with lent_from(memory):
        large, small = empty((ROWS,)), empty((4,))
    del large, small
    assert memory.num_kept == 1, "the small one is torch's"
    assert empty((ROWS,)).data_ptr() and memory.num_kept == 1
