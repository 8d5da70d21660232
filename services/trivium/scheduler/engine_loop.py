"""The engine: schedule -> execute -> update -> publish, for as long as the process lives.

Owns the one Scheduler and the one OutputProcessor of a process, and the requests of every client. Runs on one event
loop; nothing here blocks it. Up to `max_plans_in_flight` plans are with the executor, so that its round trip is hidden.

A lost executor is no error: its requests wait again with the output they have, and go on when an executor is back.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from trivium.config import DEFAULT_PLANS_IN_FLIGHT, ModelInfo, PromptAdapter, SchedulerConfig
from trivium.errors import (
    EngineUnavailableError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    TriviumError,
)
from trivium.inputs import GenerationRequest, ResumedChoice
from trivium.outputs import FinishReason
from trivium.params import SamplingParams
from trivium.prompts import resolve_max_tokens
from trivium.scheduler.best_of import BestOfSink, check_streaming, run_all_choices
from trivium.scheduler.detokenizer_client import DetokenizerClient
from trivium.scheduler.executor_client import ExecutorClient
from trivium.scheduler.output_processor import DeltaSink, OutputProcessor, OutputStream
from trivium.scheduler.request import Request, RequestStatus
from trivium.scheduler.scheduler import Scheduler
from trivium.structured_outputs import StructuredOutputsParams

logger = logging.getLogger(__name__)

_RETRY_S = 0.05


class EngineLoop:
    """Serves one model. `submit` and `abort` are called from the loop's own thread, by any number of clients."""

    def __init__(
        self,
        executor: ExecutorClient,
        detokenizer: DetokenizerClient,
        config: SchedulerConfig,
        *,
        on_ready: Callable[[bool], None] = lambda ready: None,
        on_start: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self._executor = executor
        self._detokenizer = detokenizer
        self._config = config
        self._on_ready = on_ready
        self._on_start = on_start
        self._scheduler: Scheduler | None = None
        self._outputs = OutputProcessor(detokenizer, self._finish_by_stop_string)
        self._keys = itertools.count(1)
        self._is_connected = False
        self._connected = asyncio.Event()
        self._num_held = 0  # choices that wait for their grammar
        self._tasks = asyncio.TaskGroup()
        self._is_due = False
        self._is_over = False

    @property
    def model_info(self) -> ModelInfo:
        """Facts about the model. Raises EngineUnavailableError before the first executor was reached."""
        if self._scheduler is None:
            raise EngineUnavailableError("the model is still loading", code="model_loading")
        return self._scheduler.info

    @property
    def is_ready(self) -> bool:
        return self._is_connected

    @property
    def has_scheduler(self) -> bool:
        """Whether an executor was reached since the start."""
        return self._scheduler is not None

    @property
    def scheduler(self) -> Scheduler:
        """For reading: tests and metrics."""
        assert self._scheduler is not None, "no executor was reached yet"
        return self._scheduler

    def submit(self, request: GenerationRequest, sink: DeltaSink, handle: int) -> tuple[int, ...]:
        """Start all choices of `request`; their deltas go to `sink` under `handle`.

        The keys to abort them with; `request.num_open_choices` last deltas will come. Raises InvalidRequestError,
        ContextLengthError, OverloadedError.
        """
        check_streaming(request)
        resumed = {choice.index: choice for choice in request.resume}
        if any(index >= request.sampling.n for index in resumed):
            raise InvalidRequestError(f"resume names choices {sorted(resumed)}, but n is {request.sampling.n}")
        if request.sampling.picks_best and request.num_open_choices:
            sink = BestOfSink(sink, request.sampling, resumed)
            request, resumed = run_all_choices(request), {}
        scheduler = self._admit(request)
        info = scheduler.info.limited_by(request.prompt_adapter)
        max_tokens = resolve_max_tokens(request.prompt, request.sampling, info)
        choices = [
            self._make_choice(request, resumed.get(index, ResumedChoice(index, ())), max_tokens)
            for index in range(request.sampling.n)
            if not (index in resumed and resumed[index].finished)
        ]
        needs_preparation = request.sampling.needs_preparation
        if choices and not needs_preparation:
            self._add(choices)
        for choice in choices:
            emitted_chars = resumed[choice.choice_index].emitted_chars if choice.choice_index in resumed else 0
            self._outputs.open(OutputStream(choice, sink, handle, stream=request.stream), emitted_chars=emitted_chars)
            if self._config.queue_timeout_s:
                asyncio.get_running_loop().call_later(self._config.queue_timeout_s, self._expire, choice.key)
        if choices and needs_preparation:
            self._tasks.create_task(self._add_when_prepared(choices))
        self._act_soon()
        return tuple(choice.key for choice in choices)

    def add_adapter(self, name: str) -> None:
        """The executor has loaded an adapter since it said what it has."""
        scheduler = self.scheduler
        scheduler.info = replace(scheduler.info, adapters=(*scheduler.info.adapters, name))

    def add_prompt_adapter(self, adapter: PromptAdapter) -> None:
        """The same of a soft prompt."""
        scheduler = self.scheduler
        scheduler.info = replace(scheduler.info, prompt_adapters=(*scheduler.info.prompt_adapters, adapter))

    def abort(self, keys: tuple[int, ...]) -> None:
        """End the choices named by `keys`, as far as they still run; nothing more is delivered for them."""
        for key in keys:
            request = self._outputs.request_of(key)
            if request is not None:
                self.scheduler.finish(request, FinishReason.ABORT)
                self._outputs.close(request)
        self._act_soon()

    async def run(self) -> None:
        """Serve until cancelled. A bug ends every request with InternalError and is raised."""
        try:
            async with self._tasks:
                self._tasks.create_task(self._detokenizer.run(self._outputs.on_text_result, self._outputs.on_connect))
                self._tasks.create_task(self._drive_forever())
        except asyncio.CancelledError:
            self._outputs.fail_all(EngineUnavailableError("the server is shutting down", code="draining"))
            raise
        except BaseException:
            self._outputs.fail_all(InternalError("the engine failed"))
            raise
        finally:
            await self._executor.close()

    async def _drive_forever(self) -> None:
        try:
            while True:
                info = await self._executor.connect()
                self._adopt(info)
                try:
                    await self._drive()
                except EngineUnavailableError as error:
                    logger.warning("lost the executor, %d requests wait for it: %s", len(self._outputs), error.message)
                    self._is_connected = False
                    self._connected.clear()
                    self._on_ready(False)
                    self.scheduler.requeue_all()
        finally:
            self._is_over = True

    async def _drive(self) -> None:
        self._fill_pipeline()
        while True:
            output = await self._executor.next_result()  # with nothing in flight: of a plan that `_act` will make
            for update in self.scheduler.update_from_output(output):
                if update.failure is not None:
                    error = InvalidRequestError(update.failure, param="structured_outputs", code="invalid_grammar")
                    self._fail_if_open([update.request], error)
                    continue
                self._outputs.add(update.request, update.new_token_ids, update.logprobs)
            self._fill_pipeline()  # before publishing: the executor must not wait for it
            self._outputs.flush()

    def _adopt(self, info: ModelInfo) -> None:
        """Take over a fresh executor: its batch is empty and its blocks are free."""
        if self._scheduler is None:
            self._scheduler = Scheduler(
                info, enable_prefix_caching=self._config.enable_prefix_caching, on_start=self._on_start
            )
        elif _identity(info) != _identity(self._scheduler.info):
            raise InternalError("the executor came back with another model")
        else:
            for request in self._scheduler.adopt(info):
                if self._outputs.request_of(request.key) is not None:
                    self._fail(
                        request,
                        EngineUnavailableError("the server came back with too little memory, or without the adapter"),
                    )
        for request in self._scheduler.hold_unprepared():
            self._tasks.create_task(self._release_when_prepared(request))
        self._is_connected = True
        self._connected.set()
        self._on_ready(True)
        logger.info("executor ready: %d KV blocks of %d tokens", info.num_blocks, info.block_size)

    def _add(self, choices: Sequence[Request]) -> None:
        """Queue the choices of one client request. Raises InvalidRequestError if they could never run."""
        scheduler = self.scheduler
        if choices[0].sampling.beam is not None:
            scheduler.add_beams(choices, next(self._keys))
            return
        for choice in choices:
            scheduler.check_admission(choice)
        scheduler.add_choices(choices)

    async def _add_when_prepared(self, choices: Sequence[Request]) -> None:
        """Queue choices for which the executor prepares something once it has: nobody's step waits for that."""
        self._num_held += len(choices)
        try:
            await self._prepare(choices[0].sampling)
            self._check_adapters(choices[0])
            left = [choice for choice in choices if self._outputs.request_of(choice.key) is not None]
            if left:
                self._add(left)
            for choice in left:
                if choice.is_finished:  # resumed with all of its output
                    self._outputs.add(choice, ())
        except (InvalidRequestError, ModelNotFoundError) as error:
            self._fail_if_open(choices, error)
        finally:
            self._num_held -= len(choices)
        self._act_soon()

    async def _release_when_prepared(self, request: Request) -> None:
        """Queue `request` again, which was taken out of the queue when an executor was lost."""
        try:
            await self._prepare(request.sampling)
            self._check_adapters(request)
            self.scheduler.release(request)
        except (InvalidRequestError, ModelNotFoundError) as error:
            self._fail_if_open([request] if request.beams is None else request.beams.choices, error)
        self._act_soon()

    async def _prepare(self, sampling: SamplingParams) -> None:
        if sampling.structured_outputs is not None:
            await self._compile(sampling.structured_outputs)
        if sampling.has_stopping_beams:
            await self._compile(None)

    async def _compile(self, params: StructuredOutputsParams | None) -> None:
        while True:
            await self._connected.wait()
            try:
                await self._executor.compile_grammar(params)
                return
            except EngineUnavailableError:
                await asyncio.sleep(_RETRY_S)

    def _check_adapters(self, request: Request) -> None:
        """Raise ModelNotFoundError unless the executor has them; an executor that came back may lack them."""
        self._check_adapter_names(
            request.adapter, "" if request.prompt_adapter is None else request.prompt_adapter.name
        )

    def _check_adapter_names(self, adapter: str, prompt_adapter: str) -> None:
        info = self.scheduler.info
        for name, found, param in (
            (adapter, adapter in info.adapters, "adapter"),
            (prompt_adapter, info.find_prompt_adapter(prompt_adapter) is not None, "prompt_adapter"),
        ):
            if name and not found:
                raise ModelNotFoundError(f"the adapter {name!r:.100} is not loaded", param=param)

    def _fail_if_open(self, choices: Sequence[Request], error: TriviumError) -> None:
        for choice in choices:
            if self._outputs.request_of(choice.key) is not None:
                self._fail(choice, error)

    def _fill_pipeline(self) -> None:
        scheduler = self.scheduler
        told = self._config.max_plans_in_flight or scheduler.info.max_plans_in_flight
        while scheduler.num_plans_in_flight < (told or DEFAULT_PLANS_IN_FLIGHT):
            plan = scheduler.schedule()
            if plan is None:
                return
            self._executor.submit(plan)

    def _act_soon(self) -> None:
        """Plan and publish in the next turn of the event loop: what clients ask for together is planned together."""
        if not self._is_due and not self._is_over:
            self._is_due = True
            self._tasks.create_task(self._act())

    async def _act(self) -> None:
        self._is_due = False
        if self._is_connected:
            self._fill_pipeline()
        self._outputs.flush()

    def _admit(self, request: GenerationRequest) -> Scheduler:
        scheduler, config = self._scheduler, self._config
        if scheduler is None:
            raise EngineUnavailableError("the model is still loading", code="model_loading")
        if self._is_over:
            raise EngineUnavailableError("the engine has stopped")
        num_waiting = scheduler.num_waiting + self._num_held
        if num_waiting + request.sampling.n > config.max_waiting_requests:
            raise OverloadedError(f"{num_waiting} requests wait already, the limit is {config.max_waiting_requests}")
        if scheduler.num_waiting_tokens + len(request.prompt.token_ids) > config.max_waiting_tokens:
            raise OverloadedError(
                f"{scheduler.num_waiting_tokens} prompt tokens wait already, the limit is {config.max_waiting_tokens}"
            )
        self._check_adapter_names(request.adapter, request.prompt_adapter)
        num_embeds_bytes = request.prompt.num_embeds_bytes
        if num_embeds_bytes and self._outputs.num_embeds_bytes + num_embeds_bytes > config.max_embeds_bytes:
            raise OverloadedError(
                f"the prompt embeddings of all requests would need more than {config.max_embeds_bytes} bytes"
            )
        if request.priority != 0 and config.scheduling_policy != "priority":
            raise InvalidRequestError(
                f"priority is {request.priority}, but the scheduling policy is {config.scheduling_policy}",
                param="priority",
            )
        return scheduler

    def _expire(self, key: int) -> None:
        """The queue timeout of a choice: end its request if the choice has never run."""
        request = self._outputs.request_of(key)
        if request is not None and request.status is RequestStatus.WAITING:
            waited = f"the request waited {self._config.queue_timeout_s:g} s without a place in the batch"
            self._fail(request, EngineUnavailableError(waited, code="queue_timeout"))
            self._act_soon()

    def _fail(self, request: Request, error: TriviumError) -> None:
        """End the client request that `request` is a choice of, with all its choices."""
        for choice in self._outputs.fail(request, error):
            self.scheduler.finish(choice, FinishReason.ABORT)

    def _make_choice(self, request: GenerationRequest, resumed: ResumedChoice, max_tokens: int) -> Request:
        sampling = request.sampling
        assert sampling.seed is not None, "the front door draws a seed"
        if sampling.prompt_logprobs is not None and (resumed.output_token_ids or resumed.emitted_chars):
            sampling = replace(sampling, prompt_logprobs=None)  # the client has them
        return Request(
            next(self._keys),
            request.prompt,
            sampling,
            max_tokens=max_tokens,
            choice_index=resumed.index,
            output_token_ids=resumed.output_token_ids,
            cache_salt=request.cache_salt,
            priority=request.priority,
            tenant=request.tenant,
            adapter=request.adapter,
            prompt_adapter=self.scheduler.info.find_prompt_adapter(request.prompt_adapter),
        )

    def _finish_by_stop_string(self, request: Request) -> None:
        self.scheduler.finish(request, FinishReason.STOP)
        self._act_soon()


def _identity(info: ModelInfo) -> tuple[object, ...]:
    """What an executor that takes over must have in common with the one before; memory and limits may differ."""
    return (
        info.architecture,
        info.is_encoder_decoder,
        info.vocab_size,
        info.hidden_size,
        info.eos_token_ids,
        info.decoder_start_token_id,
    )
