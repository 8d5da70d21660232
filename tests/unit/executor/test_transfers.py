"""What goes to a device in one copy."""

from __future__ import annotations

import numpy as np
import torch

from trivium.executor.transfers import Layout, refill, upload, upload_all

ARRAYS = [
    np.arange(5, dtype=np.int64),
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.array([0.25, 0.5], np.float32),
    np.zeros((0, 4), np.int32),
    np.array([True, False, True]),
    np.arange(12, dtype=np.int32).reshape(3, 4)[:, 1:3],
]


def test_arrays_of_every_type_come_back_from_one_buffer() -> None:
    layout = Layout(ARRAYS)
    packed = torch.empty(layout.num_bytes, dtype=torch.uint8)
    layout.pack(ARRAYS, packed)
    for view, array in zip(layout.views(packed), ARRAYS, strict=True):
        assert view.data_ptr() % 4 == 0
        assert np.array_equal(view.numpy(), array)
        assert view.numpy().dtype == array.dtype


def test_a_buffer_is_filled_again_behind_views_that_stay() -> None:
    target = torch.zeros(Layout(ARRAYS).num_bytes, dtype=torch.uint8)
    views = Layout(ARRAYS).views(target)
    refill([array * 2 if array.dtype != np.bool_ else ~array for array in ARRAYS], target)
    assert views[0].tolist() == [0, 2, 4, 6, 8]
    assert views[4].tolist() == [False, True, False]
    assert views[5].tolist() == [[2, 4], [10, 12], [18, 20]]


def test_on_a_cpu_nothing_is_copied() -> None:
    (tensor,) = upload_all([ARRAYS[0]], torch.device("cpu"))
    assert tensor.data_ptr() == upload(ARRAYS[0], torch.device("cpu")).data_ptr() == ARRAYS[0].ctypes.data
