"""Steps on a device that is not there: tensors without memory, on which a value cannot be looked at.

torch's "meta" device knows types and shapes, and raises where something waits for a value (`item`, `nonzero`, indexing
with a mask). OneDevice adds what a GPU would do to tensors of the host: refuse them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from trivium.executor import transfers
from trivium.executor.transfers import Array

META = torch.device("meta")
# Where tensors of the host may be made and brought to the device, by the names of the functions.
TRANSFERS = ("upload", "upload_all", "refill", "tiles_of_rows", "bounds")

# What `tolist` of a tensor of the host does: plans read the bounds of their rows.
_READS = (torch.ops.aten.resolve_conj.default, torch.ops.aten.resolve_neg.default)


class OneDevice(TorchDispatchMode):
    """Raises AssertionError for an operator with tensors of the host among its arguments or results.

    But for numbers, which a GPU takes with an operator, and within the functions that are named above.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        strangers = [tensor for tensor in found if tensor.device != META and tensor.dim() > 0]
        is_allowed = not strangers or func in _READS or _is_transfer()
        assert is_allowed, f"{func} has a tensor of the host: {list(strangers[0].shape)}"
        return result


def _is_transfer() -> bool:
    return any(frame in TRANSFERS for frame in _callers())


def _callers() -> Iterator[str]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Triton launches nothing, but checks its arguments; downloads are zeros. The names of the kernels launched."""
    launched: list[str] = []

    def getitem(kernel: Any, grid: object) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            strangers = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor) and arg.device != META]
            assert not strangers, f"{kernel} is launched with a tensor of the host"
            launched.append(kernel.fn.__name__)

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", getitem)
    monkeypatch.setattr(transfers, "download", zeros_like)
    monkeypatch.setattr(transfers.Download, "numbers", lambda download: zeros_like(download._copy))
    monkeypatch.setattr(
        torch, "equal", lambda a, b: False
    )  # is a tied weight stored twice? asked when a model is loaded
    return launched


def zeros_like(tensor: Tensor) -> Array:
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))
