"""`LocalEngine`: an EngineClient whose scheduler, executor and detokenizer are objects in this process.

They are the same classes that the services run: only the clients between them differ, and no socket is opened.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from trivium.config import ExecutorConfig, ModelInfo, PromptAdapter
from trivium.engine_args import EngineArgs
from trivium.errors import (
    ConfigurationError,
    EngineUnavailableError,
    InternalError,
    InvalidRequestError,
    TriviumError,
)
from trivium.executor.ledger import executor_ledger
from trivium.executor.model_runner import ModelRunner
from trivium.executor.model_thread import ModelThread, Unfinished
from trivium.inputs import EncodedPair, GenerationRequest, PairTexts
from trivium.ledger import ProcessLedger
from trivium.local_adapters import LocalAdapters
from trivium.outputs import ChoiceDelta, FinishReason, TokenText
from trivium.pooling import PoolingParams, PoolingType
from trivium.rpc import new_epoch
from trivium.scheduler.detokenizer_client import TextPush, TextResult, push_to_proto, result_from_proto
from trivium.scheduler.engine_loop import EngineLoop
from trivium.scheduler.ledger import scheduler_ledger
from trivium.step import ModelRunnerOutput, SchedulerOutput
from trivium.structured_outputs import StructuredOutputsParams
from trivium.tokenizer.detokenize_session import DetokenizeSession
from trivium.tokenizer.grammar_check import GrammarChecker
from trivium.tokenizer.tokenizer import Tokenizer
from trivium.v1.ledger_pb2 import ExecutorLedger, LedgerReply, TokenizerLedger

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LocalEngine:
    """EngineClient for one model in this process. All methods run on one event loop; the model has a thread."""

    def __init__(self, args: EngineArgs) -> None:
        self._args = args
        self._config = config = args.executor_config()
        self._scheduler_config = args.scheduler_config()
        self._executor = InProcessExecutorClient(config)
        self._detokenizer: InProcessDetokenizerClient | None = None
        self._process = ProcessLedger()
        self._epoch = new_epoch()
        self._running: dict[str, tuple[_Inbox, tuple[int, ...], int]] = {}  # request_id -> (inbox, keys, n)
        self._tokenizer: Tokenizer | None = None
        self._grammars: GrammarChecker | None = None
        self._loop: EngineLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self.adapters = LocalAdapters(self._executor, self._started_loop)

    async def start(self) -> None:
        """Load tokenizer and model. Raises ConfigurationError."""
        args = self._args
        if not args.skip_tokenizer_init:
            self._tokenizer = await asyncio.to_thread(
                Tokenizer.load, args.tokenizer_source, args.tokenizer_source_revision
            )
        await self._executor.load()
        self._detokenizer = InProcessDetokenizerClient(self._tokenizer)
        if self._tokenizer is not None:
            self._grammars = GrammarChecker(self._tokenizer.grammar_vocabulary)
        ready = asyncio.Event()
        self._loop = EngineLoop(
            self._executor,
            self._detokenizer,
            self._scheduler_config,
            on_ready=lambda is_ready: ready.set(),
        )
        self._task = asyncio.create_task(self._loop.run())
        await ready.wait()

    @property
    def model_info(self) -> ModelInfo:
        return self._started_loop().model_info

    @property
    def has_tokenizer(self) -> bool:
        """False with `skip_tokenizer_init`: no text goes in or out."""
        return not self._args.skip_tokenizer_init

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises InvalidRequestError if there is none."""
        if self._args.skip_tokenizer_init:
            raise InvalidRequestError(
                "there is no tokenizer (skip_tokenizer_init=True): give token ids", param="prompt", code="no_tokenizer"
            )
        assert self._tokenizer is not None, "the engine was not started"
        return self._tokenizer

    @property
    def engine_loop(self) -> EngineLoop:
        """For reading: tests and metrics."""
        return self._started_loop()

    def is_ready(self) -> bool:
        return self._loop is not None and self._loop.is_ready

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return self.tokenizer.encode(texts, add_special_tokens=add_special_tokens)

    async def encode_pair(self, texts: PairTexts) -> EncodedPair:
        return self.tokenizer.encode_pair(texts)

    async def check_grammar(self, params: StructuredOutputsParams) -> None:
        if self._grammars is None:
            raise InvalidRequestError("structured outputs need a tokenizer", param="structured_outputs")
        await self._grammars.check(params)

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        return self.tokenizer.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    async def token_texts(self, token_ids: Collection[int]) -> Mapping[int, TokenText]:
        return dict(zip(token_ids, self.tokenizer.token_texts(token_ids), strict=True))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[ChoiceDelta, None]:
        loop = self._started_loop()
        inbox = _Inbox()
        keys = loop.submit(request, inbox, 0)
        self._running[request.request_id] = inbox, keys, request.sampling.n
        num_left = request.num_open_choices
        try:
            while num_left:
                news = await inbox.get()
                if isinstance(news, TriviumError):
                    raise news
                num_left -= news.finish_reason is not None
                yield news
        finally:
            self._running.pop(request.request_id, None)
            if num_left:
                loop.abort(keys)

    def abort(self, request_id: str) -> bool:
        """End a request early: its open choices get a last delta with FinishReason.ABORT. False if none runs."""
        if request_id not in self._running:
            return False
        inbox, keys, num_choices = self._running.pop(request_id)
        self._started_loop().abort(keys)
        inbox.abort(num_choices)
        return True

    async def hidden_states(
        self, prompts: Sequence[Sequence[int]], kind: PoolingType, *, normalize: bool
    ) -> list[Tensor]:
        """Vectors of `prompts`, which are one job of the model's thread, between two steps. Raises InternalError."""
        self._started_loop()
        return await self._executor.embed(prompts, kind, normalize=normalize)

    async def embed(self, prompts: Sequence[Sequence[int]], params: PoolingParams) -> list[Sequence[float]]:
        kind = params.resolve(is_encoder_decoder=self.model_info.is_encoder_decoder)
        vectors = await self.hidden_states(prompts, kind, normalize=params.normalize)
        return [vector.tolist() for vector in vectors]

    async def ledger(self) -> dict[str, LedgerReply | None]:
        """Of "engine": all services in one process."""
        reply = self._process.reply("engine", self._epoch)
        if self._loop is not None and self._loop.has_scheduler and self._detokenizer is not None:
            reply.scheduler.CopyFrom(scheduler_ledger(self._loop.scheduler))
            reply.executor.CopyFrom(self._executor.ledger())
            models = [self._config.served_model_name]
            reply.tokenizer.CopyFrom(TokenizerLedger(detokenize_handles=self._detokenizer.num_handles, models=models))
        return {"engine": reply}

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._grammars is not None:
            await self._grammars.close()
        await self._executor.close()

    def _started_loop(self) -> EngineLoop:
        if self._loop is None:
            raise EngineUnavailableError("the engine was not started", code="model_loading")
        if self._task is not None and self._task.done():
            raise EngineUnavailableError("the engine has stopped")
        return self._loop


class _Inbox(asyncio.Queue[ChoiceDelta | TriviumError]):
    """DeltaSink of one request; holds at most its own output."""

    def __init__(self) -> None:
        super().__init__()
        self._finished: set[int] = set()  # choices with their last delta

    def deliver(self, handle: int, delta: ChoiceDelta) -> None:
        if delta.finish_reason is not None:
            self._finished.add(delta.index)
        self.put_nowait(delta)

    def abort(self, num_choices: int) -> None:
        """The last delta of every choice that had none."""
        for index in range(num_choices):
            if index not in self._finished:
                self.deliver(0, ChoiceDelta(index, finish_reason=FinishReason.ABORT))

    def fail(self, handle: int, error: TriviumError) -> None:
        self.put_nowait(error)


class InProcessExecutorClient:
    """ExecutorClient around the ModelThread that an executor process runs too."""

    def __init__(self, config: ExecutorConfig) -> None:
        self._config = config
        self._results: asyncio.Queue[ModelRunnerOutput | TriviumError] = asyncio.Queue()
        self._thread: ModelThread | None = None
        self._num_steps_done = 0

    async def load(self) -> None:
        """Load the model. Raises ConfigurationError."""
        self._thread = ModelThread(self._config, asyncio.get_running_loop())
        self._thread.start()
        outcomes: set[asyncio.Future[Any]] = {self._thread.loaded, self._thread.failed}
        await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
        if self._thread.failed.done():
            raise self._thread.failed.result()
        self._thread.failed.add_done_callback(lambda _: self._results.put_nowait(InternalError("the model failed")))

    async def connect(self) -> ModelInfo:
        return self._running_thread().loaded.result()

    async def load_adapter(self, name: str, source: str) -> None:
        """Raises ConfigurationError."""
        await self._load(lambda runner: runner.load_adapter(name, source))

    async def load_prompt_adapter(self, name: str, source: str) -> PromptAdapter:
        """Raises ConfigurationError."""
        return await self._load(lambda runner: runner.load_prompt_adapter(name, source))

    async def _load(self, load: Callable[[ModelRunner], T]) -> T:
        """What `load` returns in the model's thread. Raises its ConfigurationError."""
        errors: list[ConfigurationError] = []

        def attempt(runner: ModelRunner) -> tuple[T, ...]:
            try:
                return (load(runner),)
            except ConfigurationError as error:
                errors.append(error)
                return ()

        loaded = await self._running_thread().run(attempt)
        if errors:
            raise errors[0]
        return loaded[0]

    def submit(self, plan: SchedulerOutput) -> None:
        self._running_thread().submit(partial(self._execute, plan))

    async def next_result(self) -> ModelRunnerOutput:
        result = await self._results.get()
        if isinstance(result, TriviumError):
            raise result
        self._num_steps_done += 1
        return result

    async def compile_grammar(self, params: StructuredOutputsParams | None) -> None:
        thread, compiled = self._running_thread(), asyncio.get_running_loop().create_future()

        def done(error: InvalidRequestError | None) -> None:
            thread.call_in_loop(_settle, compiled, error)

        thread.submit(lambda runner: runner.prepare_grammar(params, done))
        error = await compiled
        if error is not None:
            raise error

    async def embed(self, prompts: Sequence[Sequence[int]], kind: PoolingType, *, normalize: bool) -> list[Tensor]:
        return await self._running_thread().run(lambda runner: runner.embed(prompts, kind, normalize=normalize))

    def ledger(self) -> ExecutorLedger:
        runner = self._running_thread().runner
        assert runner is not None, "use before load"
        return executor_ledger(runner, steps_done=self._num_steps_done)

    async def close(self) -> None:
        if self._thread is not None and not self._thread.failed.done():
            await self._thread.stop()

    def _execute(self, plan: SchedulerOutput, runner: ModelRunner) -> Unfinished | None:
        """Runs in the model's thread."""
        try:
            return Unfinished(runner.start(plan), self._deliver)
        except Exception:
            logger.exception("step %d failed", plan.step)
            self._deliver(InternalError("the model failed"))
            return None

    def _deliver(self, result: ModelRunnerOutput | TriviumError) -> None:
        self._running_thread().call_in_loop(self._results.put_nowait, result)

    def _running_thread(self) -> ModelThread:
        assert self._thread is not None, "use before load"
        return self._thread


def _settle(compiled: asyncio.Future[InvalidRequestError | None], error: InvalidRequestError | None) -> None:
    if not compiled.done():
        compiled.set_result(error)


class InProcessDetokenizerClient:
    """DetokenizerClient around a DetokenizeSession: a push is answered in the next turn of the event loop.

    Without a tokenizer nothing may be pushed: requests then have `detokenize=False`.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._session = None if tokenizer is None else DetokenizeSession(tokenizer)
        self._pushes: asyncio.Queue[TextPush] = asyncio.Queue()

    @property
    def num_handles(self) -> int:
        return 0 if self._session is None else self._session.num_handles

    def push(self, push: TextPush) -> None:
        self._pushes.put_nowait(push)

    async def run(self, on_result: Callable[[TextResult], None], on_connect: Callable[[], None]) -> None:
        on_connect()
        while True:
            push = await self._pushes.get()
            assert self._session is not None, "text was asked for without a tokenizer"
            on_result(result_from_proto(self._session.apply(push_to_proto(push))))
