"""How the ranks of one model exchange tensors: a seam with one rank that does nothing, and torch.distributed behind it.

Ranks run the same code on the same plans, so every one of them calls the same methods in the same order with tensors
of the same shapes. What comes back has the same bits on all of them; each goes on from it by itself, and no rank ever
tells another what it decided.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

LOAD_TIMEOUT_S = 1800.0  # one rank may read its weights from a slower disk than the others
STEP_TIMEOUT_S = 60.0  # for a rank that lives and does nothing; one that has died is noticed at once

_POLL_S = 0.01


class Communicator(Protocol):
    """rank in [0, size). Raises RuntimeError if another rank is gone or does not answer in time."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, which may be overwritten."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape] all ranks' `x`."""
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """The only rank of a model that is not split."""

    rank: int = 0
    size: int = 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)


ALONE = Alone()


class RankGroup:
    """The ranks of this machine, by torch.distributed: gloo over loopback on CPUs, NCCL on GPUs.

    They find each other by the file `rendezvous`, in a directory of their own, in the first call: loading weights waits
    for nobody. The objects behind `torch.distributed` are used without its global default group, so that one process
    can have several models. check: is called while this rank waits for the others to come, and raises if they never
    will. Owner: whoever runs the model, in one thread.
    """

    def __init__(
        self, rank: int, size: int, rendezvous: str, device: torch.device, check: Callable[[], None] = lambda: None
    ) -> None:
        self.rank = rank
        self.size = size
        self._rendezvous = rendezvous
        self._device = rank_device(device, rank)
        self._check = check
        self._timeout_s = LOAD_TIMEOUT_S
        self._group: Any = None

    def sum(self, x: Tensor) -> Tensor:
        """On a CPU added in the order of the ranks, so that a token's sum does not depend on what else is in `x`."""
        if self._device.type == "cuda" and x.numel():
            self._connected().allreduce([x]).wait()
            return x
        total, *others = self.gather(x).unbind(0)
        for other in others:
            total.add_(other)
        return total

    def gather(self, x: Tensor) -> Tensor:
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=self._device)
        if x.numel():
            mine = x.to(self._device).contiguous()
            self._connected().allgather([list(gathered.unbind(0))], [mine]).wait()
        return gathered

    def set_timeout(self, seconds: float) -> None:
        """How long each coming call may take."""
        self._timeout_s = seconds
        if self._group is not None:
            self._group.set_timeout(timedelta(seconds=seconds))

    def close(self) -> None:
        if self._group is not None:
            self._group.shutdown()
            self._group = None

    def _connected(self) -> Any:
        if self._group is None:
            self._group = self._connect()
        return self._group

    def _connect(self) -> Any:
        from torch import distributed

        arrivals = [Path(f"{self._rendezvous}.{rank}") for rank in range(self.size)]
        arrivals[self.rank].touch()
        while not all(arrival.exists() for arrival in arrivals):  # the store would wait, and ask nobody
            self._check()
            time.sleep(_POLL_S)
        store: Any = distributed.FileStore(self._rendezvous, self.size)  # type: ignore[attr-defined]
        timeout = timedelta(seconds=self._timeout_s)
        return (_open_nccl if self._device.type == "cuda" else _open_gloo)(store, self.rank, self.size, timeout)


def rank_device(device: torch.device, rank: int) -> torch.device:
    """Where a rank runs: each has a GPU of its own."""
    return torch.device("cuda", rank) if device.type == "cuda" else device


def agree_on_least(communicator: Communicator, numbers: Sequence[int]) -> tuple[int, ...]:
    """The least of each number over all ranks."""
    if communicator.size == 1:
        return tuple(numbers)
    return tuple(communicator.gather(torch.tensor(numbers)).amin(0).tolist())


def _open_gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    from torch.distributed import ProcessGroupGloo

    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    # By its name the machine may have an address that others reach; nothing of this is for them.
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return gloo(store, rank, size, options)


def _open_nccl(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    from torch.distributed import ProcessGroupNCCL

    torch.cuda.set_device(rank_device(torch.device("cuda"), rank))
    nccl: Any = ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, rank, size, options)
