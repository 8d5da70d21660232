"""The other ranks of a model: processes that this one starts, tells what to do, and outlives by no more than a moment.

A rank gets its calls by a pipe, which is its standard input: nothing times out while there is nothing to do, and the
end of the pipe, however this process ends, is the end of the rank. It reports by another pipe why it cannot go on; the
end of that one is how its own end is noticed at once, whatever this process is doing. One lost rank is the end of all:
the others would wait for it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import torch

from trivium.errors import ConfigurationError
from trivium.executor.parallel.communicator import STEP_TIMEOUT_S, RankGroup
from trivium.executor.parallel.frames import Call, write_call
from trivium.process import EXIT_CONFIGURATION, wait_passively

logger = logging.getLogger(__name__)

_END_S = 2.0  # for a rank that is told to end, and for the news of one that has ended


class RankLostError(RuntimeError):
    """A rank was ended by somebody else, or by the system."""


class Ranks:
    """Ranks 1 to size - 1; this process is rank 0. Owner: whoever runs the model, in one thread.

    on_lost: is told, in a thread of this object and at most once, why the ranks have ended before `close`.
    """

    def __init__(
        self,
        size: int,
        *,
        name: str,
        device: torch.device,
        on_lost: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._directory = tempfile.mkdtemp(prefix="trivium-ranks-")
        rendezvous = os.path.join(self._directory, "rendezvous")
        self.communicator = RankGroup(0, size, rendezvous, device, self._check)
        self._on_lost = on_lost
        self._is_closing = False
        self._loss: Exception | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._pipes: list[int] = []  # the write ends of the ranks' standard inputs
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, size):
            read_end, write_end = os.pipe()
            os.set_blocking(write_end, False)
            self._pipes.append(write_end)
            self._processes.append(_start(rank, size, rendezvous, device, name, read_end))
            os.close(read_end)
        for rank, process in enumerate(self._processes, start=1):
            threading.Thread(target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks 1, 2, ..."""
        return [process.pid for process in self._processes]

    def call(self, call: Call, arguments: bytes = b"") -> None:
        """Have every rank do the same as this one is about to do. Raises if a rank is gone, or all are closed."""
        self._check()
        for pipe in self._pipes:
            write_call(pipe, call, arguments, STEP_TIMEOUT_S)

    def remove_rendezvous(self) -> None:
        """To be called once the ranks have met: so nothing is left of it, however this process ends."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def fail(self, error: Exception) -> Exception:
        """End all ranks because of `error` here; what to raise: the loss of a rank, if that was the reason."""
        reason = self._loss if self._ended.wait(_END_S) else None
        self.close()
        return reason or error

    def close(self) -> None:
        """End the ranks. Calls and collective operations are impossible afterwards."""
        with self._lock:
            self._is_closing = True
            pipes, self._pipes = self._pipes, []
        for pipe in pipes:
            os.close(pipe)
        deadline = time.monotonic() + _END_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.communicator.close()
        self.remove_rendezvous()

    def _check(self) -> None:
        if self._loss is not None:
            raise self._loss
        if self._is_closing:
            raise RuntimeError("the ranks have ended")

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None, "the process was started with pipes"
        with process.stdout as reports:
            report = reports.read()
        exit_code = process.wait()
        with self._lock:
            if self._is_closing or self._loss is not None:
                return
            self._loss = error = why_lost(rank, report, exit_code)
        if not isinstance(error, ConfigurationError):
            logger.error("%s; nothing can go on without it", error)
        for other in self._processes:
            other.kill()
        self.remove_rendezvous()
        self._ended.set()
        self._on_lost(error)


def _start(
    rank: int, size: int, rendezvous: str, device: torch.device, name: str, calls: int
) -> subprocess.Popen[bytes]:
    """By `subprocess`, which uses vfork: a fork would run the handlers of gRPC and of torch's threads."""
    environ = dict(os.environ)
    wait_passively(environ)
    level = logging.getLevelName(logging.getLogger("trivium").getEffectiveLevel())
    arguments = (str(rank), str(size), rendezvous, device.type, name, level)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "trivium.executor.parallel.rank_process", *arguments],
        stdin=calls,
        stdout=subprocess.PIPE,
        env=environ,
    )


def why_lost(rank: int, report: bytes, exit_code: int) -> Exception:
    """What the end of a rank means. report: what it printed."""
    if exit_code == EXIT_CONFIGURATION and report:
        return ConfigurationError(str(json.loads(report)))
    if exit_code >= 0:  # its own fault, which it has logged
        return RuntimeError(f"rank {rank} failed with code {exit_code}")
    number = -exit_code
    name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
    return RankLostError(f"rank {rank} was ended by {name}")
