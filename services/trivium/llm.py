"""`LLM`: offline use. The engine's cores run in this process, without a socket."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from tqdm import tqdm

from trivium.beam_params import BeamSearchParams
from trivium.config import DEFAULT_MAX_LORA_RANK, DEFAULT_MAX_LORAS, ExecutorConfig, ModelInfo
from trivium.errors import InvalidRequestError
from trivium.generation_defaults import default_max_tokens, default_sampling_params, with_necessities
from trivium.inputs import EncodedPrompt, GenerationRequest, LoRARequest, Prompt
from trivium.local_engine import LocalEngine
from trivium.logprobs import named_ids, to_dicts
from trivium.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    Logprob,
    RequestOutput,
    TokenLogprobs,
)
from trivium.params import SamplingParams
from trivium.prompts import encode_prompt, resolve_max_tokens
from trivium.sampling_tokens import check_sampling_tokens, complete_sampling, resolve_texts
from trivium.scheduler.engine_loop import EngineLoop

T = TypeVar("T")
Params: TypeAlias = SamplingParams | BeamSearchParams


class LLM:
    """A model in this process. Owns a thread with an event loop; `close` (or leaving a `with` block) ends it.

    model: a local directory, a bundled name ("trivium-chat", "trivium-translate") or a hub id.
    dtype: "auto", "float", "float32", "bfloat16" or "float16"; on a CPU all of them compute in float32.
    seed: drives the requests that have no seed of their own, in the order in which they are given.
    kv_cache_memory_bytes: None takes a share of free memory, and the log says how many tokens that is.
    gpu_memory_utilization: the share of a GPU's memory to use, 0.9 by default; it has no effect on a CPU.
    swap_space: GiB of host memory for the keys and values of preempted requests; 0 has them computed again.
    enable_prompt_embeds: takes prompts as embeddings (EmbedsPrompt).
    quantization: None, or "int8" for 8-bit matrix products: faster, a little less exact.
    generation_config: "auto" for the model's own generation_config.json, "none", or the path of another.
    enable_lora: prompts can have a `lora_request`, of at most max_lora_rank, at most max_loras of them in one batch.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        seed: int = 0,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float | None = None,
        swap_space: float = 0.0,
        quantization: str | None = None,
        num_threads: int = 0,
        enable_prefix_caching: bool = True,
        generation_config: str = "auto",
        enable_lora: bool = False,
        max_lora_rank: int = DEFAULT_MAX_LORA_RANK,
        max_loras: int = DEFAULT_MAX_LORAS,
        enable_prompt_embeds: bool = False,
    ) -> None:
        config = ExecutorConfig(
            model=model,
            served_model_name=model,
            dtype=dtype,
            device=device,
            revision=revision,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            swap_space_gib=swap_space,
            quantization=quantization,
            num_threads=num_threads,
            generation_config=generation_config,
            enable_lora=enable_lora,
            max_lora_rank=max_lora_rank,
            max_loras=max_loras,
        )
        self._enable_prompt_embeds = enable_prompt_embeds
        self._random = random.Random(seed)
        self._request_numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trivium-llm", daemon=True)
        self._thread.start()
        self._engine = LocalEngine(config, tokenizer=tokenizer, enable_prefix_caching=enable_prefix_caching)
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

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without parameters gets, by the model's generation_config.json, for the shortest prompt."""
        return default_sampling_params(self.model_info)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        return self._call(self._engine.encode([text], add_special_tokens=add_special_tokens))[0]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a chat, by the model's chat template. Raises InvalidRequestError if it has none."""
        return self._call(self._engine.render(messages, add_generation_prompt=add_generation_prompt))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt, batched; results are in the order of `prompts`.

        `lora_request` is an adapter for all prompts, or one (or None) for each; it is loaded at its first use.

        `sampling_params` is one for all prompts or one for each, taken as it is; BeamSearchParams mean beam search,
        None takes what the model's generation_config.json says. Raises InvalidRequestError, before anything runs, if
        any prompt or parameter is wrong.
        """
        items = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        adapters = _adapters_for(items, lora_request)
        requests = self._call(self._make_requests(items, self._params_for(items, sampling_params), adapters))
        with tqdm(total=len(requests), desc="Generating", unit="prompt", disable=not use_tqdm) as progress:
            return self._call(self._run_all(requests, progress))

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[BeamSearchOutput]:
        """All beams of every prompt, best first, with the prompt in front of tokens and text.

        `params.num_return_sequences` is not heeded: there are as many sequences as beams. Raises InvalidRequestError.
        """
        every_beam = replace(params, num_return_sequences=params.beam_width)
        outputs = self.generate(prompts, every_beam, use_tqdm=use_tqdm, lora_request=lora_request)
        return [_to_beam_output(output) for output in outputs]

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

    @staticmethod
    def _params_for(prompts: Sequence[Prompt], params: Params | Sequence[Params] | None) -> Sequence[Params | None]:
        if params is None or isinstance(params, SamplingParams | BeamSearchParams):
            return [params] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidRequestError(
                f"{len(prompts)} prompts but {len(params)} sampling_params", param="sampling_params"
            )
        return list(params)

    async def _make_requests(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[Params | None],
        adapters: Sequence[LoRARequest | None],
    ) -> list[GenerationRequest]:
        info = self._engine.model_info
        for wanted in {adapter for adapter in adapters if adapter is not None}:
            await self._engine.load_adapter(wanted)
        requests = []
        for prompt, given, adapter in zip(prompts, params, adapters, strict=True):
            encoded = await encode_prompt(prompt, self._engine, info)
            if encoded.num_embeds_bytes and not self._enable_prompt_embeds:
                raise InvalidRequestError(
                    "prompt_embeds needs LLM(enable_prompt_embeds=True)", param="prompt_embeds", code="feature_disabled"
                )
            sampling = await self._complete(given, encoded)
            if sampling.seed is None:
                sampling = replace(sampling, seed=self._random.getrandbits(63))
            name = "" if adapter is None else adapter.lora_name
            requests.append(GenerationRequest(str(next(self._request_numbers)), encoded, sampling, adapter=name))
        return requests

    async def _complete(self, given: Params | None, prompt: EncodedPrompt) -> SamplingParams:
        """`given` checked, or the defaults of the checkpoint."""
        info = self._engine.model_info
        if given is None:
            resolved = await complete_sampling(
                {}, prompt, info, self._engine, fallback_max_tokens=default_max_tokens(info)
            )
            return resolved.sampling
        if isinstance(given, BeamSearchParams):
            given = given.to_sampling_params(num_prompt_tokens=len(prompt.token_ids))
        resolve_max_tokens(prompt, given, info)
        sampling = await resolve_texts(given, self._engine)
        check_sampling_tokens(sampling, info)
        return with_necessities(sampling, prompt, info)

    async def _run_all(self, requests: Sequence[GenerationRequest], progress: tqdm[Any]) -> list[RequestOutput]:
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._run_one(request, progress)) for request in requests]
        except BaseExceptionGroup as group:  # the caller gets the first cause; the other requests are aborted
            raise group.exceptions[0] from None
        return [task.result() for task in running]

    async def _run_one(self, request: GenerationRequest, progress: tqdm[Any]) -> RequestOutput:
        sampling = request.sampling
        outputs = [CompletionOutput(index) for index in range(sampling.n)]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in outputs]
        prompt_logprobs: list[TokenLogprobs] = []
        async for delta in self._engine.generate(request):
            outputs[delta.index].add(delta)
            logprobs[delta.index] += delta.logprobs
            prompt_logprobs += delta.prompt_logprobs
        progress.update()
        result = _to_output(request.request_id, request.prompt, outputs)
        if sampling.logprobs is not None:
            for output, values in zip(outputs, logprobs, strict=True):
                output.logprobs = await self._named(output.token_ids, values)
        if sampling.prompt_logprobs is not None:
            result.prompt_logprobs = [None, *await self._named(result.prompt_token_ids[1:], prompt_logprobs)]
        return result

    async def _named(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> list[dict[int, Logprob]]:
        texts = await self._engine.token_texts(named_ids(token_ids, logprobs))
        return to_dicts(token_ids, logprobs, texts)


def _adapters_for(
    prompts: Sequence[Prompt], adapters: LoRARequest | Sequence[LoRARequest | None] | None
) -> Sequence[LoRARequest | None]:
    if adapters is None or isinstance(adapters, LoRARequest):
        return [adapters] * len(prompts)
    if len(adapters) != len(prompts):
        raise InvalidRequestError(f"{len(prompts)} prompts but {len(adapters)} lora_requests", param="lora_request")
    if not all(isinstance(adapter, LoRARequest | None) for adapter in adapters):
        raise InvalidRequestError("lora_request must hold LoRARequest or None for each prompt", param="lora_request")
    return adapters


def _to_output(request_id: str, prompt: EncodedPrompt, outputs: list[CompletionOutput]) -> RequestOutput:
    encoder_ids = prompt.encoder_token_ids
    return RequestOutput(
        request_id=request_id,
        prompt=prompt.text,
        prompt_token_ids=list(prompt.token_ids),
        outputs=outputs,
        finished=True,
        encoder_prompt=prompt.encoder_text,
        encoder_prompt_token_ids=None if encoder_ids is None else list(encoder_ids),
    )


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
