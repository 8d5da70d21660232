"""`AsyncLLM`: the engine in this process for programs with an event loop of their own; outputs come while they grow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from trivium.adapters import LoRARequest, PromptAdapterRequest
from trivium.config import ModelInfo
from trivium.engine_args import read_engine_args
from trivium.errors import EngineUnavailableError, InvalidRequestError
from trivium.guided import LLMGuidedOptions
from trivium.inputs import Prompt
from trivium.local_engine import LocalEngine
from trivium.offline import ChatSettings, Messages, Params, RequestOptions, RequestRunner
from trivium.outputs import EmbeddingOutput, PoolingRequestOutput, RequestOutput
from trivium.pooling import PoolingParams, PoolingType
from trivium.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AsyncLLM:
    """A model in this process, for one event loop: that of the first call. Arguments are those of `LLM`.

    `async with` loads the model and frees it at the end; else the first call loads it, and `close` frees it.
    """

    def __init__(self, model: str, **engine_args: Any) -> None:
        args = read_engine_args(model, engine_args)
        self._engine = LocalEngine(args)
        self._runner = RequestRunner(self._engine, args)
        self._start: asyncio.Task[None] | None = None
        self._is_closed = False
        self._running: set[str] = set()  # ids that callers gave

    async def start(self) -> None:
        """Load the model; nothing to do if it is loaded. Raises ConfigurationError."""
        if self._is_closed:
            raise EngineUnavailableError("the engine was closed")
        if self._start is None:
            self._start = asyncio.create_task(self._engine.start())
        await asyncio.shield(self._start)

    @property
    def model_info(self) -> ModelInfo:
        """Raises EngineUnavailableError before the model is loaded."""
        return self._engine.model_info

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer, as transformers has it."""
        return self._engine.tokenizer.copy_backend()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: Params | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | None = None,
        prompt_adapter_request: PromptAdapterRequest | None = None,
        guided_options_request: LLMGuidedOptions | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one prompt as they grow; `SamplingParams.output_kind` says what each holds.

        request_id: for `abort`, not that of a request that runs. Closing the generator aborts the request, too. Raises
        InvalidRequestError before the first output if prompt or parameters are wrong.
        """
        await self.start()
        if request_id is not None and (not request_id or request_id in self._running):
            raise InvalidRequestError(f"request_id {request_id!r:.80} is in use or empty", param="request_id")
        options = RequestOptions(
            params=sampling_params,
            guided=guided_options_request,
            priority=priority,
            request_id=request_id,
            is_streamed=True,
            lora_request=lora_request,
            prompt_adapter_request=prompt_adapter_request,
        )
        if request_id is not None:
            self._running.add(request_id)
        try:
            request = await self._runner.make_request(prompt, options)
            async with aclosing(self._runner.stream(request)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._running.discard(request_id or "")

    async def chat(
        self,
        messages: Messages,
        sampling_params: Params | None = None,
        request_id: str | None = None,
        *,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoRARequest | None = None,
        prompt_adapter_request: PromptAdapterRequest | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one conversation as they grow; see `LLM.chat` and `generate`."""
        await self.start()
        settings = ChatSettings(
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
        )
        prompt = self._runner.chat_prompt(messages, settings)
        answer = self.generate(
            prompt,
            sampling_params,
            request_id,
            lora_request=lora_request,
            prompt_adapter_request=prompt_adapter_request,
            priority=priority,
        )
        async with aclosing(answer) as outputs:
            async for output in outputs:
                yield output

    async def embed(
        self, prompts: Sequence[Prompt], pooling_params: PoolingParams | None = None
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """One vector for each prompt; see `LLM.embed`."""
        await self.start()
        params = pooling_params or PoolingParams()
        if params.pooling_type == PoolingType.ALL:
            raise InvalidRequestError("embed gives one vector", param="pooling_type")
        with Progress(len(prompts), False) as progress:
            pooled = await self._runner.pool(prompts, params, progress)
        return [
            PoolingRequestOutput(item.request_id, EmbeddingOutput(item.vector.tolist()), item.prompt_token_ids)
            for item in pooled
        ]

    async def abort(self, request_id: str) -> bool:
        """End a request: its last output has what there is, with finish_reason "abort". False if none runs."""
        return self._engine.abort(request_id)

    async def close(self) -> None:
        """Abort what runs and free the model. Further calls raise EngineUnavailableError."""
        self._is_closed = True
        if self._start is not None:
            await asyncio.gather(self._start, return_exceptions=True)
            self._start = None
            await self._engine.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
