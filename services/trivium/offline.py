"""What `LLM` and `AsyncLLM` share: from a caller's prompts and parameters to RequestOutputs, on one LocalEngine.

Everything asynchronous here runs on the engine's event loop.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from trivium.adapters import LoRARequest, PromptAdapterRequest
from trivium.beam_params import BeamSearchParams
from trivium.chat_embeds import EmbedsPart, chat_prompt, take_embeds, with_embeds
from trivium.chat_utils import encoder_decoder_chat
from trivium.config import ModelInfo
from trivium.embeds import PromptEmbeds
from trivium.engine_args import EngineArgs
from trivium.errors import InvalidRequestError, rename_params
from trivium.generation_defaults import default_max_tokens, with_necessities
from trivium.guided import LLMGuidedOptions, guided_fields
from trivium.inputs import (
    EncodedPrompt,
    GenerationRequest,
    Prompt,
    TokensPrompt,
    is_explicit_encoder_decoder,
)
from trivium.local_engine import LocalEngine
from trivium.logprobs import named_ids, to_dicts
from trivium.outputs import ChoiceDelta, CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from trivium.params import RequestOutputKind, SamplingParams, check_int
from trivium.pooling import PoolingParams, check_pooled_length, packs
from trivium.progress import Progress
from trivium.prompt_truncation import Truncation
from trivium.prompts import encode_prompt, resolve_max_tokens
from trivium.sampling_tokens import check_sampling_tokens, complete_sampling, resolve_texts

if TYPE_CHECKING:
    from torch import Tensor

Params: TypeAlias = SamplingParams | BeamSearchParams
Messages: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """How a chat becomes a prompt. Names are vLLM's; chat_template is a template, not a file."""

    chat_template: str | None = None
    chat_template_content_format: str = "auto"
    chat_template_kwargs: Mapping[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What a request has beside its prompt. priority: lower first, where the scheduling policy says so."""

    params: Params | None = None
    guided: LLMGuidedOptions | None = None
    priority: int = 0
    request_id: str | None = None
    is_streamed: bool = False
    lora_request: LoRARequest | None = None
    prompt_adapter_request: PromptAdapterRequest | None = None


@dataclass(frozen=True, slots=True)
class Pooled:
    """vector: float32, [hidden] or [num_tokens, hidden]."""

    request_id: str
    prompt_token_ids: list[int]
    vector: Tensor


class RequestRunner:
    """Makes, numbers and runs requests. Owner of the random numbers that requests without a seed get."""

    def __init__(self, engine: LocalEngine, args: EngineArgs) -> None:
        self._engine = engine
        self._random = random.Random(args.seed)
        self._request_numbers = itertools.count()
        self._max_logprobs = args.max_logprobs
        self._enable_prompt_embeds = args.enable_prompt_embeds

    async def make_request(self, prompt: Prompt, options: RequestOptions) -> GenerationRequest:
        """Raises InvalidRequestError for a wrong prompt or parameter."""
        given = options.params
        adapter, prompt_adapter = await self._load_adapters(options)
        info = self._engine.model_info.limited_by(prompt_adapter)
        truncation = Truncation.of(given) if isinstance(given, SamplingParams) else None
        encoded = await encode_prompt(prompt, self._engine, info, truncation=truncation)
        if encoded.num_embeds_bytes and not self._enable_prompt_embeds:
            raise InvalidRequestError(
                "prompt_embeds needs LLM(enable_prompt_embeds=True)", param="prompt_embeds", code="feature_disabled"
            )
        sampling = await self._complete(given, encoded, info, options.guided)
        if sampling.seed is None:
            sampling = replace(sampling, seed=self._random.getrandbits(63))
        check_int("priority", options.priority, -(2**31), 2**31 - 1)
        return GenerationRequest(
            options.request_id or str(next(self._request_numbers)),
            encoded,
            sampling,
            stream=options.is_streamed,
            priority=options.priority,
            adapter=adapter,
            prompt_adapter=prompt_adapter,
        )

    async def _load_adapters(self, options: RequestOptions) -> tuple[str, str]:
        """Names of LoRA adapter and soft prompt, loaded. Raises InvalidRequestError."""
        lora, soft, adapters = options.lora_request, options.prompt_adapter_request, self._engine.adapters
        if not isinstance(lora, LoRARequest | None):
            raise InvalidRequestError(f"not a LoRARequest: {lora!r:.60}", param="lora_request")
        if not isinstance(soft, PromptAdapterRequest | None):
            raise InvalidRequestError(f"not a PromptAdapterRequest: {soft!r:.60}", param="prompt_adapter_request")
        if lora is not None:
            await adapters.load(lora)
        if soft is not None:
            await adapters.load_prompt(soft)
        return "" if lora is None else lora.lora_name, "" if soft is None else soft.prompt_adapter_name

    def chat_prompt(self, messages: Messages, settings: ChatSettings) -> Prompt:
        """The prompt that a conversation is. Raises InvalidRequestError."""
        cleared, parts = take_embeds(messages)
        embeds = [_to_embeds(part) for part in parts]
        if self._engine.model_info.is_encoder_decoder:
            for name in ("chat_template", "tools", "chat_template_kwargs"):
                if getattr(settings, name):
                    raise InvalidRequestError(f"an encoder-decoder model takes no {name}", param=name)
            read = with_embeds(cleared, embeds)
            texts = [{**message, "content": _content(message.get("content"))} for message in read]
            return encoder_decoder_chat(texts, continues=settings.continue_final_message)
        tokenizer = self._engine.tokenizer
        rendering: dict[str, Any] = {
            "tools": settings.tools,
            "add_generation_prompt": settings.add_generation_prompt,
            "continue_final_message": settings.continue_final_message,
            "template_kwargs": settings.chat_template_kwargs,
            "template": settings.chat_template,
            "content_format": settings.chat_template_content_format,
        }
        chat = tokenizer.chat(cleared, **rendering)
        if embeds:
            return chat_prompt(chat.token_ids, embeds)
        return TokensPrompt(prompt_token_ids=chat.token_ids, prompt=chat.text)

    async def pool(self, prompts: Sequence[Prompt], params: PoolingParams, progress: Progress) -> list[Pooled]:
        """The vector of every prompt, in packs of at most `max_num_batched_tokens`. Raises InvalidRequestError."""
        info = self._engine.model_info
        kind = params.resolve(is_encoder_decoder=info.is_encoder_decoder)
        all_ids = [await self._pooled_ids(prompt, params) for prompt in prompts]
        pooled: list[Pooled] = []
        for pack in packs(all_ids, info.max_num_batched_tokens):
            for ids, vector in zip(
                pack, await self._engine.hidden_states(pack, kind, normalize=params.normalize), strict=True
            ):
                pooled.append(Pooled(str(next(self._request_numbers)), list(ids), vector))
                progress.add_tokens(len(ids))
        return pooled

    async def _pooled_ids(self, prompt: Prompt, params: PoolingParams) -> tuple[int, ...]:
        """The ids that the model (its encoder) reads. Raises InvalidRequestError."""
        info = self._engine.model_info
        if is_explicit_encoder_decoder(prompt):
            raise InvalidRequestError("a vector is of one text: give no pair", param="prompt", code="invalid_prompt")
        wanted = params.truncate_prompt_tokens
        if wanted not in (None, -1):
            check_int("truncate_prompt_tokens", wanted, 1, 2**24)
        truncation = None if wanted is None else Truncation(wanted, num_reserved=0)
        encoded = await encode_prompt(prompt, self._engine, info, truncation=truncation)
        if encoded.num_embeds_bytes:
            raise InvalidRequestError(
                "a vector is of text or token ids, not of prompt_embeds", param="prompt_embeds", code="invalid_prompt"
            )
        ids = encoded.token_ids if encoded.encoder_token_ids is None else encoded.encoder_token_ids
        check_pooled_length(len(ids), info, "prompt")
        return ids

    async def run(self, request: GenerationRequest) -> RequestOutput:
        """The whole output of `request`. Raises TriviumError."""
        outputs = _Outputs(request)
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                outputs.add(delta)
        return await self._shown(outputs)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as `output_kind` says; closing this early aborts the request. Raises TriviumError."""
        kind = request.sampling.output_kind
        outputs, num_left = _Outputs(request), request.sampling.n
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                num_left -= delta.finish_reason is not None
                if kind is RequestOutputKind.DELTA:
                    outputs = _Outputs(request, num_cached_tokens=outputs.num_cached_tokens)
                outputs.add(delta)
                if kind is RequestOutputKind.FINAL_ONLY and num_left:
                    continue
                shown = await self._shown(outputs, only=delta.index if kind is RequestOutputKind.DELTA else None)
                shown.finished = not num_left
                yield shown

    async def _complete(
        self, given: Params | None, prompt: EncodedPrompt, info: ModelInfo, guided: LLMGuidedOptions | None
    ) -> SamplingParams:
        """`given` checked, or the defaults of the checkpoint."""
        fields = {} if guided is None else guided_fields(guided)
        if given is None:
            resolved = await complete_sampling(
                fields, prompt, info, self._engine, fallback_max_tokens=default_max_tokens(info)
            )
            sampling = resolved.sampling
        else:
            if isinstance(given, BeamSearchParams):
                given = given.to_sampling_params(num_prompt_tokens=len(prompt.token_ids))
            given = replace(given, **fields)
            resolve_max_tokens(prompt, given, info)
            sampling = await resolve_texts(given, self._engine)
            check_sampling_tokens(sampling, info)
            sampling = with_necessities(sampling, prompt, info)
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(sampling, name) or 0) > self._max_logprobs:
                raise InvalidRequestError(
                    f"{name} is {getattr(sampling, name)}, max_logprobs is {self._max_logprobs}", param=name
                )
        return sampling if self._engine.has_tokenizer else _without_text(sampling)

    async def _shown(self, outputs: _Outputs, *, only: int | None = None) -> RequestOutput:
        """What a caller gets of `outputs`: copies, with the texts of tokens. only: this choice and no other."""
        request = outputs.request
        sampling, prompt = request.sampling, request.prompt
        choices = []
        for choice, values in zip(outputs.choices, outputs.logprobs, strict=True):
            if only in (None, choice.index):
                shown = replace(choice, token_ids=list(choice.token_ids))
                if sampling.logprobs is not None:
                    named = await self._named(shown.token_ids, values)
                    shown.logprobs = cast("list[dict[int, Logprob]]", named)  # of an output each is of a token
                choices.append(shown)
        encoder_ids = prompt.encoder_token_ids
        result = RequestOutput(
            request_id=request.request_id,
            prompt=prompt.text,
            prompt_token_ids=list(prompt.token_ids),
            outputs=choices,
            finished=all(choice.finished() for choice in choices),
            encoder_prompt=prompt.encoder_text,
            encoder_prompt_token_ids=None if encoder_ids is None else list(encoder_ids),
            num_cached_tokens=outputs.num_cached_tokens,
        )
        if sampling.prompt_logprobs is not None and outputs.has_prompt_logprobs:
            result.prompt_logprobs = [None, *await self._named(result.prompt_token_ids[1:], outputs.prompt_logprobs)]
        return result

    async def _named(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> list[dict[int, Logprob] | None]:
        if not self._engine.has_tokenizer:
            return to_dicts(token_ids, logprobs, {})
        texts = await self._engine.token_texts(named_ids(token_ids, logprobs))
        return to_dicts(token_ids, logprobs, texts)


class _Outputs:
    """Puts together what one request has generated. Owner: one call of `run` or `stream`."""

    def __init__(self, request: GenerationRequest, *, num_cached_tokens: int | None = None) -> None:
        self.request = request
        self.num_cached_tokens = num_cached_tokens
        self.choices = [CompletionOutput(index) for index in range(request.sampling.n)]
        self.logprobs: list[list[TokenLogprobs]] = [[] for _ in self.choices]
        self.prompt_logprobs: list[TokenLogprobs] = []

    @property
    def has_prompt_logprobs(self) -> bool:
        """They come with the first delta; a prompt of one token has none."""
        return len(self.prompt_logprobs) == len(self.request.prompt.token_ids) - 1

    def add(self, delta: ChoiceDelta) -> None:
        self.choices[delta.index].add(delta)
        self.logprobs[delta.index] += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        if delta.num_cached_tokens is not None:
            self.num_cached_tokens = delta.num_cached_tokens


def _without_text(sampling: SamplingParams) -> SamplingParams:
    """`sampling` for an engine without a tokenizer."""
    if sampling.stop:
        raise InvalidRequestError(
            "stop strings need a tokenizer, which skip_tokenizer_init=True left out: use stop_token_ids", param="stop"
        )
    return replace(sampling, detokenize=False)


def _content(content: Any) -> Any:
    """What a message says: embeddings, or its text; parts are joined by newlines."""
    if isinstance(content, str) or (isinstance(content, Mapping) and "prompt_embeds" in content):
        return content
    parts = content if isinstance(content, list | tuple) else [None]
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(
            "message content may be text or parts of type text", param="messages", code="unsupported_content"
        )
    return "\n".join(map(str, texts))


def _to_embeds(part: EmbedsPart) -> PromptEmbeds:
    """What a part of a message holds: a tensor, or what a client of the server would send."""
    from trivium.prompt_embeds import decode_embeds, to_prompt_embeds  # numpy is loaded only where it is used

    try:
        is_encoded = isinstance(part.value, str | dict)
        return decode_embeds(part.value) if is_encoded else to_prompt_embeds(part.value)
    except InvalidRequestError as error:
        raise rename_params(error, {"prompt_embeds": part.param}) from None
