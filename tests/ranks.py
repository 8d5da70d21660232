"""Ranks of one model as threads of this process: the same code on the same shards, without processes and sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from trivium.config import ExecutorConfig, ModelInfo, PromptAdapter
from trivium.executor.model_runner import ModelRunner
from trivium.executor.parallel.communicator import Communicator
from trivium.executor.platform import Platform
from trivium.pooling import PoolingType
from trivium.step import ModelRunnerOutput, SchedulerOutput

T = TypeVar("T")


class Meeting:
    """Where the threads put their tensors for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tensors: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def communicators(self) -> list[ThreadCommunicator]:
        return [ThreadCommunicator(self, rank) for rank in range(self.size)]


class ThreadCommunicator:
    """Refuses what real ranks would get stuck in: tensors of different shapes."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = meeting.size

    def gather(self, x: Tensor) -> Tensor:
        meeting = self._meeting
        meeting.tensors[self.rank] = x
        meeting.barrier.wait()
        tensors = list(meeting.tensors)
        assert len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1, [tensor.shape for tensor in tensors]
        gathered = torch.stack(tensors)
        meeting.barrier.wait()
        return gathered

    def sum(self, x: Tensor) -> Tensor:
        total, *others = self.gather(x).unbind(0)
        for other in others:
            total = total + other
        return total


class ThreadRanks:
    """One thread a rank."""

    def __init__(self, size: int) -> None:
        self._meeting = Meeting(size)
        self._communicators = self._meeting.communicators()
        self._threads = [ThreadPoolExecutor(1) for _ in range(size)]

    def run(self, work: Callable[[Communicator], T]) -> list[T]:
        """What `work` makes of each rank. Raises what one of them raised."""

        def guarded(communicator: ThreadCommunicator) -> T:
            torch.set_num_threads(1)
            try:
                return work(communicator)
            except BaseException:
                self._meeting.barrier.abort()
                raise

        ranks = zip(self._threads, self._communicators, strict=True)
        futures = [thread.submit(guarded, communicator) for thread, communicator in ranks]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            self._meeting.barrier.reset()
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()


class ThreadedRunner:
    """A model split over the threads, to be used as a ModelRunner: all ranks must find the same.

    platform: of all ranks, None for the CPU's own.
    """

    def __init__(self, ranks: ThreadRanks, config: ExecutorConfig, platform: Platform | None = None) -> None:
        self._ranks = ranks
        choose = None if platform is None else lambda *_: platform
        self.runners = ranks.run(lambda communicator: ModelRunner(config, communicator, choose))

    @property
    def model_info(self) -> ModelInfo:
        infos = [runner.model_info for runner in self.runners]
        assert all(info == infos[0] for info in infos)
        return infos[0]

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        output, *others = self._each(lambda runner: runner.execute(plan))
        assert all(other == output for other in others), (output, others)
        return output

    def embed(self, prompts: Sequence[Sequence[int]], kind: PoolingType, *, normalize: bool) -> list[Tensor]:
        vectors, *others = self._each(lambda runner: runner.embed(prompts, kind, normalize=normalize))
        for other in others:
            assert all(map(torch.equal, vectors, other))
        return vectors

    def load_adapter(self, name: str, source: str) -> None:
        self._each(lambda runner: runner.load_adapter(name, source))

    def load_prompt_adapter(self, name: str, source: str) -> PromptAdapter:
        adapter, *others = self._each(lambda runner: runner.load_prompt_adapter(name, source))
        assert all(other == adapter for other in others)
        return cast("PromptAdapter", adapter)

    def check_invariants(self) -> None:
        self._each(lambda runner: runner.check_invariants())

    def _each(self, work: Callable[[ModelRunner], Any]) -> list[Any]:
        return self._ranks.run(lambda communicator: work(self.runners[communicator.rank]))
