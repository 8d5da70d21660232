"""`LLM`: offline use. The engine's cores run in this process, without a socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from trivium.adapters import LoRARequest, PromptAdapterRequest
from trivium.beam_params import BeamSearchParams
from trivium.config import ModelInfo
from trivium.engine_args import read_engine_args
from trivium.errors import InvalidRequestError
from trivium.generation_defaults import default_sampling_params
from trivium.guided import LLMGuidedOptions
from trivium.inputs import GenerationRequest, Prompt, TokensPrompt, check_token_ids
from trivium.local_engine import LocalEngine
from trivium.offline import ChatSettings, Messages, Params, Pooled, RequestOptions, RequestRunner
from trivium.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    EmbeddingOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
)
from trivium.params import SamplingParams
from trivium.pooling import PoolingParams, PoolingType
from trivium.progress import Progress
from trivium.scheduler.engine_loop import EngineLoop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
UseTqdm = bool | Callable[..., Any]
Adapters = LoRARequest | Sequence[LoRARequest | None] | None
PromptAdapters = PromptAdapterRequest | Sequence[PromptAdapterRequest | None] | None


class LLM:
    """A model in this process. Owns a thread with an event loop; `close` (or leaving a `with` block) ends it.

    model: a local directory, a bundled name ("trivium-chat", "trivium-translate") or a hub id. What else can be set,
    and what vLLM's other arguments do here: `EngineArgs` and `engine_args.py`.
    """

    def __init__(self, model: str, **engine_args: Any) -> None:
        args = read_engine_args(model, engine_args)
        self._engine = LocalEngine(args)
        self._runner = RequestRunner(self._engine, args)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trivium-llm", daemon=True)
        self._thread.start()
        try:
            self._call(self._engine.start())
        except BaseException:
            self.close()
            raise

    @property
    def model_info(self) -> ModelInfo:
        return self._engine.model_info

    @property
    def engine_loop(self) -> EngineLoop:
        """The running engine, for reading."""
        return self._engine.engine_loop

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer, as transformers has it: changing it changes nothing here."""
        return self._engine.tokenizer.copy_backend()

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without parameters gets, by the model's generation_config.json, for the shortest prompt."""
        return default_sampling_params(self.model_info)

    def render_chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a chat, by the model's chat template. Raises InvalidRequestError if it has none."""
        return self._call(self._engine.render(messages, add_generation_prompt=add_generation_prompt))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params | Sequence[Params] | None = None,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: Adapters = None,
        prompt_adapter_request: PromptAdapters = None,
        guided_options_request: LLMGuidedOptions | None = None,
        *,
        inputs: Prompt | Sequence[Prompt] | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt, batched; results are in the order of `prompts`.

        `sampling_params` is one for all prompts or one for each, taken as it is; BeamSearchParams mean beam search,
        None takes what the model's generation_config.json says. prompt_token_ids: the ids of one prompt or of each,
        with `prompts` as their texts; it and `inputs`, another name of `prompts`, are for older programs. priority:
        of each prompt, with scheduling_policy="priority". lora_request: an adapter for all prompts, or one (or None)
        for each, loaded at its first use; prompt_adapter_request: the same of soft prompts. Raises InvalidRequestError,
        before anything runs, if any prompt or parameter is wrong.
        """
        if inputs is not None and prompts is not None:
            raise InvalidRequestError("give prompts or inputs, not both", param="inputs")
        items = _prompt_list(inputs if prompts is None else prompts, prompt_token_ids)
        return self._generate(
            items,
            sampling_params,
            use_tqdm,
            guided=guided_options_request,
            priority=priority,
            adapters=(lora_request, prompt_adapter_request),
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: Adapters = None,
        chat_template: str | None = None,
        *,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: Sequence[int] | None = None,
        prompt_adapter_request: PromptAdapters = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, by the model's chat template or `chat_template` (a template, not a file:
        `load_chat_template`).

        tools are shown to the model; what it calls stands in the text. An encoder-decoder model reads the last user
        message, and with `continue_final_message` goes on from the last one. Raises InvalidRequestError.
        """
        settings = ChatSettings(
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
        )
        prompts = [self._runner.chat_prompt(conversation, settings) for conversation in _conversations(messages)]
        return self._generate(
            prompts, sampling_params, use_tqdm, priority=priority, adapters=(lora_request, prompt_adapter_request)
        )

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: Adapters = None,
        use_tqdm: UseTqdm = False,
    ) -> list[BeamSearchOutput]:
        """All beams of every prompt, best first, with the prompt in front of tokens and text.

        `params.num_return_sequences` is not heeded: there are as many sequences as beams. Raises InvalidRequestError.
        """
        every_beam = replace(params, num_return_sequences=params.beam_width)
        outputs = self._generate(_prompt_list(prompts, None), every_beam, use_tqdm, adapters=(lora_request, None))
        return [_to_beam_output(output) for output in outputs]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: UseTqdm = True,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Hidden states of every prompt as tensors: those of all tokens, not normalised, unless `pooling_params` say.

        Of an encoder-decoder model they are the encoder's output. Raises InvalidRequestError.
        """
        params = pooling_params or PoolingParams(pooling_type=PoolingType.ALL, normalize=False)
        return [
            PoolingRequestOutput(item.request_id, PoolingOutput(item.vector), item.prompt_token_ids)
            for item in self._pool(prompts, params, use_tqdm)
        ]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: UseTqdm = True,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """One vector of length 1 for every prompt; see PoolingParams. Raises InvalidRequestError."""
        params = pooling_params or PoolingParams()
        if params.pooling_type == PoolingType.ALL:
            raise InvalidRequestError("embed gives one vector: encode gives that of every token", param="pooling_type")
        return [
            PoolingRequestOutput(item.request_id, EmbeddingOutput(item.vector.tolist()), item.prompt_token_ids)
            for item in self._pool(prompts, params, use_tqdm)
        ]

    def score(
        self, data_1: Prompt | Sequence[Prompt], data_2: Prompt | Sequence[Prompt], *, use_tqdm: UseTqdm = True
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """How near the vectors of two prompts are (the cosine of their angle): one with each, or pair by pair."""
        first, second = _prompt_list(data_1, None), _prompt_list(data_2, None)
        if len(first) not in (1, len(second)):
            raise InvalidRequestError(f"{len(first)} prompts but {len(second)} to compare them with", param="data_2")
        pooled = self._pool([*first, *second], PoolingParams(), use_tqdm)
        left = pooled[: len(first)] * (len(second) // len(first) if second else 0)
        return [
            PoolingRequestOutput(
                b.request_id, ScoringOutput(float(a.vector @ b.vector)), a.prompt_token_ids + b.prompt_token_ids
            )
            for a, b in zip(left, pooled[len(first) :], strict=True)
        ]

    def close(self) -> None:
        """Abort what runs and free the model. Further calls raise."""
        if self._loop.is_closed():
            return
        self._call(self._engine.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the engine's loop; Ctrl-C cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _generate(
        self,
        prompts: Sequence[Prompt],
        params: Params | Sequence[Params] | None,
        use_tqdm: UseTqdm,
        *,
        guided: LLMGuidedOptions | None = None,
        priority: Sequence[int] | None = None,
        adapters: tuple[Adapters, PromptAdapters] = (None, None),
    ) -> list[RequestOutput]:
        params_of = _one_each(prompts, params, "sampling_params")
        priorities = [0] * len(prompts) if priority is None else _one_each(prompts, priority, "priority")
        loras = _one_each(prompts, adapters[0], "lora_request")
        soft_prompts = _one_each(prompts, adapters[1], "prompt_adapter_request")
        options = [
            RequestOptions(params=one, guided=guided, priority=rank, lora_request=lora, prompt_adapter_request=soft)
            for one, rank, lora, soft in zip(params_of, priorities, loras, soft_prompts, strict=True)
        ]
        requests = self._call(self._make_requests(prompts, options))
        with Progress(len(requests), use_tqdm) as progress:
            return self._call(self._run_all(requests, progress))

    def _pool(self, prompts: Prompt | Sequence[Prompt], params: PoolingParams, use_tqdm: UseTqdm) -> list[Pooled]:
        items = _prompt_list(prompts, None)
        with Progress(len(items), use_tqdm) as progress:
            return self._call(self._runner.pool(items, params, progress))

    async def _make_requests(
        self, prompts: Sequence[Prompt], options: Sequence[RequestOptions]
    ) -> list[GenerationRequest]:
        make = self._runner.make_request
        return [await make(prompt, option) for prompt, option in zip(prompts, options, strict=True)]

    async def _run_all(self, requests: Sequence[GenerationRequest], progress: Progress) -> list[RequestOutput]:
        async def run(request: GenerationRequest) -> RequestOutput:
            output = await self._runner.run(request)
            progress.add(output)
            return output

        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(run(request)) for request in requests]
        except BaseExceptionGroup as group:  # the caller gets the first cause; the other requests are aborted
            raise group.exceptions[0] from None
        return [task.result() for task in running]


_SINGLE = (SamplingParams, BeamSearchParams, LoRARequest, PromptAdapterRequest, int)


def _one_each(prompts: Sequence[Prompt], values: Any, name: str) -> list[Any]:
    """One value for each of `prompts`: a single one is for all."""
    if values is None or isinstance(values, _SINGLE):
        return [values] * len(prompts)
    if not isinstance(values, Sequence):
        raise InvalidRequestError(f"{name} must be one or a list, got {values!r:.60}", param=name)
    if len(values) != len(prompts):
        raise InvalidRequestError(f"{len(prompts)} prompts but {len(values)} {name}", param=name)
    return list(values)


def _prompt_list(prompts: Prompt | Sequence[Prompt] | None, token_ids: Any) -> list[Prompt]:
    """The prompts of a call, where `token_ids` are of the older form: of one prompt or of each."""
    items = [prompts] if isinstance(prompts, (str, dict)) else list(prompts or ())
    if token_ids is None:
        if prompts is None:
            raise InvalidRequestError("prompts is missing", param="prompts", code="missing_prompt")
        return items
    is_one = bool(token_ids) and isinstance(token_ids[0], int)
    lists = [check_token_ids(ids, "prompt_token_ids") for ids in ([token_ids] if is_one else token_ids)]
    if prompts is None:
        return [TokensPrompt(prompt_token_ids=ids) for ids in lists]
    if len(items) != len(lists) or not all(isinstance(item, str) for item in items):
        raise InvalidRequestError(
            f"{len(items)} prompts but {len(lists)} prompt_token_ids: each text needs its ids", param="prompt_token_ids"
        )
    return [TokensPrompt(prompt_token_ids=ids, prompt=str(text)) for text, ids in zip(items, lists, strict=True)]


def _conversations(messages: Any) -> list[Messages]:
    """One conversation is a list of messages, several are a list of those."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidRequestError("messages must be a non-empty list", param="messages", code="invalid_messages")
    return [messages] if isinstance(messages[0], Mapping) else list(messages)


def _to_beam_output(output: RequestOutput) -> BeamSearchOutput:
    sequences = [
        BeamSearchSequence(
            tokens=[*output.prompt_token_ids, *choice.token_ids],
            text=(output.prompt or "") + choice.text,
            cum_logprob=choice.cumulative_logprob or 0.0,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )
        for choice in output.outputs
    ]
    return BeamSearchOutput(sequences)
