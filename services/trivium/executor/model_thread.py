"""The plain thread that owns the ModelRunner: it loads the model, then runs jobs strictly in order.

A job may leave a step whose result is still on its way from a GPU. Jobs that wait go first then, so that the GPU has
its next step before anybody waits for this one; results are delivered in the order of the steps.

The event loop never runs the model and never waits for it, so it can send heartbeats during a step of any length.
Jobs go in through a queue without a bound (the server bounds what each stream may queue); results come back as
callbacks in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from trivium.config import ExecutorConfig, ModelInfo
from trivium.errors import ConfigurationError, EngineUnavailableError, InternalError
from trivium.executor.deferred_steps import StartedStep
from trivium.executor.model_runner import ModelRunner
from trivium.executor.parallel.leading_runner import open_runner
from trivium.executor.parallel.ranks import RankLostError
from trivium.step import ModelRunnerOutput

logger = logging.getLogger(__name__)

T = TypeVar("T")
_MAX_STEPS_UNDER_WAY = 8  # more would not keep a GPU busier, and their results would come late


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What a job leaves to do: `deliver` the result of `step`, called in the model's thread."""

    step: StartedStep
    deliver: Callable[[ModelRunnerOutput], None]


Job = Callable[[ModelRunner], Unfinished | None]


class ModelThread:
    """`loaded` becomes the model's facts; `failed` the exception that ended the thread or a rank, if one did.

    Both futures belong to the event loop that constructs this object; waiters shield them from their own cancellation.
    """

    def __init__(self, config: ExecutorConfig, loop: asyncio.AbstractEventLoop) -> None:
        self.loaded: asyncio.Future[ModelInfo] = loop.create_future()
        self.failed: asyncio.Future[BaseException] = loop.create_future()
        self._config = config
        self._loop = loop
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._runner: ModelRunner | None = None
        # A daemon: loading cannot be interrupted, and must not keep a stopped process alive.
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    @property
    def runner(self) -> ModelRunner | None:
        """None until the model is loaded. The thread owns it: others read numbers from it, and call nothing."""
        return self._runner

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Run `job` after all jobs before it. An exception that it lets escape ends the thread."""
        self._jobs.put(job)

    async def run(self, job: Callable[[ModelRunner], T]) -> T:
        """The result of `job`, run like any other.

        Raises InternalError if it failed, and the thread goes on; EngineUnavailableError if a rank was lost.
        """
        result: asyncio.Future[T | Exception] = self._loop.create_future()

        def answer(value: T | Exception) -> None:
            if not result.done():  # else its caller is gone
                result.set_result(value)

        def run_job(runner: ModelRunner) -> None:
            if result.cancelled():
                return None
            try:
                value: T | Exception = job(runner)
            except RankLostError as error:
                value = error
            except Exception as error:
                logger.exception("a job failed")
                value = error
            self.call_in_loop(answer, value)

        self.submit(run_job)
        found = await result
        if isinstance(found, RankLostError):
            raise EngineUnavailableError("the executor is gone")
        if isinstance(found, Exception):
            raise InternalError("the model failed")
        return found

    def call_in_loop(self, callback: Callable[..., None], *args: object) -> None:
        """Called from another thread: run `callback` in the event loop, unless that is gone."""
        with contextlib.suppress(RuntimeError):  # the loop was closed while a step was running
            self._loop.call_soon_threadsafe(callback, *args)

    async def stop(self) -> None:
        """Let the jobs that are queued finish, then end the thread."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            runner = self._runner = open_runner(self._config, on_lost=self._report)
            self.call_in_loop(self.loaded.set_result, runner.model_info)
            self._run_jobs(runner)
        except BaseException as error:
            if not isinstance(error, (ConfigurationError, RankLostError)):
                logger.exception("the model thread failed")
            self._report(error)
        finally:
            if self._runner is not None:
                self._runner.close()

    def _run_jobs(self, runner: ModelRunner) -> None:
        """Until None comes."""
        left: deque[Unfinished] = deque()
        while True:
            must_wait = bool(left) and (self._jobs.empty() or len(left) >= _MAX_STEPS_UNDER_WAY)
            while left and (must_wait or left[0].step.is_done):
                must_wait = False
                unfinished = left.popleft()
                unfinished.deliver(unfinished.step.result())
            if left and self._jobs.empty():
                continue
            job = self._jobs.get()
            if job is None:
                break
            found = job(runner)
            if found is not None:
                left.append(found)
        for unfinished in left:
            unfinished.deliver(unfinished.step.result())

    def _report(self, error: BaseException) -> None:
        self.call_in_loop(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_result(error)
