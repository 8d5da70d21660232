"""POST /v1/completions.

`max_tokens` defaults to 16, as OpenAI documents. For an encoder-decoder model, whose output is as long as its input
asks for, it defaults to 256 or what the model can do, whichever is less.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from trivium.config import ModelInfo
from trivium.engine import EngineClient
from trivium.errors import InvalidRequestError
from trivium.outputs import ChoiceDelta, CompletionOutput
from trivium_gateway.endpoint import GenerationEndpoint, Job
from trivium_gateway.errors import relocated
from trivium_gateway.generation import Generation
from trivium_gateway.openai_protocol import UNSUPPORTED_COMPLETION, Completion, CompletionChoice, CompletionRequest
from trivium_gateway.prompts import completion_prompts, encode_prompts
from trivium_gateway.sampling import fit_sampling, sampling_params, shown_finish
from trivium_gateway.streaming import ChunkEncoder
from trivium_gateway.usage import Usage

DEFAULT_MAX_TOKENS = 16
DEFAULT_MAX_TOKENS_ENCODER_DECODER = 256


class CompletionsEndpoint(GenerationEndpoint[CompletionRequest]):
    """Text in, text out."""

    request_type = CompletionRequest
    unsupported = UNSUPPORTED_COMPLETION
    id_prefix = "cmpl"
    operation = "text_completion"

    async def jobs(self, request: CompletionRequest, engine: EngineClient, info: ModelInfo) -> list[Job]:
        sampling = sampling_params(request, max_tokens=request.max_tokens, info=info)
        default = DEFAULT_MAX_TOKENS_ENCODER_DECODER if info.is_encoder_decoder else DEFAULT_MAX_TOKENS
        placed_prompts = completion_prompts(request, info)
        jobs = []
        for placed, prompt in zip(placed_prompts, await encode_prompts(placed_prompts, engine, info), strict=True):
            try:
                fitting = fit_sampling(sampling, prompt, info, default_max_tokens=default)
            except InvalidRequestError as error:
                raise relocated(error, part="prompt", to=placed.param) from None
            jobs.append(Job(prompt, fitting))
        return jobs

    def response(self, generation: Generation, outputs: Sequence[CompletionOutput], usage: Usage) -> Completion:
        choices = [
            CompletionChoice(
                index=output.index,
                text=output.text,
                finish_reason=shown_finish(output.finish_reason),
                stop_reason=output.stop_reason,
            )
            for output in outputs
        ]
        return Completion(
            id=generation.id, created=generation.created, model=generation.model, choices=choices, usage=usage
        )

    def encoder(self, generation: Generation, *, include_usage: bool) -> ChunkEncoder:
        return CompletionChunks(generation, include_usage=include_usage)


class CompletionChunks:
    """Stream events of one completion call. All that does not change from event to event is encoded once."""

    def __init__(self, generation: Generation, *, include_usage: bool) -> None:
        encode = msgspec.json.encode
        self._encode = encode
        self._include_usage = include_usage
        self._head = b'data: {"id":%b,"object":"text_completion","created":%d,"model":%b,"choices":[' % (
            encode(generation.id),
            generation.created,
            encode(generation.model),
        )
        self._choices = [b'%b{"index":%d,"text":' % (self._head, choice) for choice in range(generation.num_choices)]
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._more = b',"logprobs":null,"finish_reason":null,"stop_reason":null}' + self._end

    def chunk(self, choice: int, delta: ChoiceDelta) -> bytes:
        if delta.finish_reason is None:
            return self._choices[choice] + self._encode(delta.text) + self._more if delta.text else b""
        return b'%b%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b}%b' % (
            self._choices[choice],
            self._encode(delta.text),
            self._encode(delta.finish_reason.value),
            self._encode(delta.stop_reason),
            self._end,
        )

    def usage(self, usage: Usage) -> bytes:
        return b'%b],"usage":%b}\n\n' % (self._head, self._encode(usage)) if self._include_usage else b""
