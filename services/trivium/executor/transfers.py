"""Between host and device: the only places where a step's numbers go up and come back.

On a CPU nothing is copied. For a GPU, what goes up lies in pinned memory and is queued without waiting, many arrays in
one copy; pinned memory is given back by torch only once a copy from it has been made. `download` waits for the device;
`Download` does so only when it is asked for its numbers, so that the next step can be queued before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

_TYPES = {name: getattr(torch, name) for name in ("bool", "int32", "int64", "float32", "float64")}
_ALIGNMENT = 16  # bytes: what kernels expect of the beginning of a tensor


def upload(array: Array, device: torch.device) -> Tensor:
    """`array` on `device`; on a CPU it is the same memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def upload_all(arrays: Sequence[Array], device: torch.device) -> tuple[Tensor, ...]:
    """The same of many arrays, in one copy."""
    if device.type == "cpu":
        return tuple(torch.from_numpy(array) for array in arrays)
    layout = Layout(arrays)
    packed = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    layout.pack(arrays, packed)
    return layout.views(packed.to(device, non_blocking=True))


def refill(arrays: Sequence[Array], target: Tensor) -> None:
    """Write to `target`, bytes on a device that hold arrays of the same shapes, in one copy."""
    layout = Layout(arrays)
    packed = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=target.is_cuda)
    layout.pack(arrays, packed)
    target.copy_(packed, non_blocking=True)


def download(tensor: Tensor) -> Array:
    """The numbers of `tensor`; on a CPU in the same memory."""
    found: Array = tensor.cpu().numpy()
    return found


class Layout:
    """Where each of several arrays lies in one buffer of bytes."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._parts: list[tuple[int, tuple[int, ...], torch.dtype]] = []  # (first byte, shape, type)
        self.num_bytes = 0
        for array in arrays:
            self._parts.append((self.num_bytes, array.shape, _TYPES[array.dtype.name]))
            self.num_bytes += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT

    def pack(self, arrays: Sequence[Array], target: Tensor) -> None:
        """Write the arrays to `target`, bytes on the host."""
        for view, array in zip(self.views(target), arrays, strict=True):
            view.copy_(torch.from_numpy(array))

    def views(self, packed: Tensor) -> tuple[Tensor, ...]:
        """The arrays in `packed`, as tensors that share its memory."""
        return tuple(
            packed[start : start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize].view(dtype).view(shape)
            for start, shape, dtype in self._parts
        )


class Download:
    """A result on its way to the host. It is queued when this object is made."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        if not tensor.is_cuda:
            self._copy = tensor.clone()
        else:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def numbers(self) -> Array:
        """Waits until they are here."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        found: Array = self._copy.numpy()
        return found
