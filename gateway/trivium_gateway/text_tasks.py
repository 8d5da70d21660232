"""POST /v1/translations and /v1/summarizations: texts in, one text per choice out, by an encoder-decoder model.

They are completions of such a model with another face: inputs are texts only, lengths may be told as transformers does
(`max_length`, `min_length`), and what the request leaves unset is the checkpoint's. Nothing is streamed.
"""

from __future__ import annotations

from typing import ClassVar

from trivium.config import ModelInfo
from trivium.engine import EngineClient
from trivium.errors import InvalidRequestError
from trivium.generation_defaults import default_max_tokens
from trivium_gateway.endpoint import GenerationEndpoint, Job
from trivium_gateway.errors import relocated
from trivium_gateway.generation import ChoiceCollector, Generation
from trivium_gateway.logprobs import LogprobsForm
from trivium_gateway.openai_protocol import (
    UNSUPPORTED_TEXT_TASK,
    TextTaskRequest,
    TextTaskResponse,
    TextTaskResult,
)
from trivium_gateway.prompts import MAX_PROMPTS, PlacedPrompt, encode_prompts, with_languages
from trivium_gateway.sampling import fit_sampling, given_sampling, shown_finish, truncation_of
from trivium_gateway.stream_extras import StreamExtras
from trivium_gateway.streaming import ChunkEncoder
from trivium_gateway.usage import Usage


class TextTaskEndpoint(GenerationEndpoint[TextTaskRequest]):
    """What both tasks do."""

    request_type = TextTaskRequest
    unsupported = UNSUPPORTED_TEXT_TASK
    result_name: ClassVar[str]  # the response's `object`

    async def jobs(self, request: TextTaskRequest, engine: EngineClient, info: ModelInfo) -> list[Job]:
        if not info.is_encoder_decoder:
            raise InvalidRequestError(
                f"model {request.model} is decoder-only: use completions", param="model", code="not_encoder_decoder"
            )
        form = self.logprobs_form(request)
        given = given_sampling(request, max_tokens=request.max_tokens, info=info, logprobs=form)
        placed_prompts = _inputs(request)
        prompts = await encode_prompts(placed_prompts, engine, info, truncation_of(given, None))
        jobs = []
        for placed, prompt in zip(placed_prompts, prompts, strict=True):
            try:
                fitting = await fit_sampling(given, prompt, info, engine, fallback_max_tokens=default_max_tokens(info))
            except InvalidRequestError as error:
                raise relocated(error, part="encoder_prompt", to=placed.param) from None
            jobs.append(Job(prompt, fitting.sampling, fitting.applied))
        return jobs

    def logprobs_form(self, request: TextTaskRequest) -> LogprobsForm:
        return LogprobsForm(num_top=None, num_prompt_top=None)

    def response(self, generation: Generation, collected: ChoiceCollector, usage: Usage) -> TextTaskResponse:
        results = [
            TextTaskResult(
                index=output.index,
                input_index=output.index // generation.n,
                text=output.text,
                finish_reason=shown_finish(output.finish_reason),
                stop_reason=output.stop_reason,
            )
            for output in collected.outputs
        ]
        return TextTaskResponse(
            id=generation.id,
            object=self.result_name,
            created=generation.created,
            model=generation.model,
            results=results,
            usage=usage,
        )

    def encoder(self, generation: Generation, extras: StreamExtras) -> ChunkEncoder:
        raise AssertionError("stream is refused before")


class TranslationsEndpoint(TextTaskEndpoint):
    """Text in one language in, text in another out."""

    id_prefix = "trans"
    operation = "translation"
    result_name = "translation"


class SummarizationsEndpoint(TextTaskEndpoint):
    """Long text in, short text out."""

    id_prefix = "sum"
    operation = "summarization"
    result_name = "summarization"


def _inputs(request: TextTaskRequest) -> list[PlacedPrompt]:
    """The texts of `request`, at least one."""
    value = request.input
    if value is None:
        raise InvalidRequestError("input is missing", param="input", code="missing_input")
    texts = value if isinstance(value, list) else [value]
    if not 1 <= len(texts) <= MAX_PROMPTS:
        raise InvalidRequestError(
            f"input must be text or a list of 1 to {MAX_PROMPTS} texts, got {len(texts)}",
            param="input",
            code="invalid_input",
        )
    placed = []
    for index, text in enumerate(texts):
        param = f"input[{index}]" if isinstance(value, list) else "input"
        if not isinstance(text, str) or not text:
            raise InvalidRequestError(f"{param} must be text that is not empty", param=param, code="invalid_input")
        placed.append(PlacedPrompt(with_languages(text, request.source_language, request.target_language), param))
    return placed
