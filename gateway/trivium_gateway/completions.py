"""POST /v1/completions.

Where neither the request nor the checkpoint has a limit, `max_tokens` is 16, as OpenAI documents. For an
encoder-decoder model, whose output is as long as its input asks for, it is 256 or what the model can do, whichever is
less.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from trivium.config import ModelInfo
from trivium.engine import EngineClient
from trivium.errors import InvalidRequestError
from trivium.generation_defaults import default_max_tokens
from trivium.inputs import EncodedPrompt
from trivium.outputs import ChoiceDelta, CompletionOutput, TokenLogprobs
from trivium_gateway.endpoint import GenerationEndpoint, Job
from trivium_gateway.generation import ChoiceCollector, Generation
from trivium_gateway.logprobs import CompletionLogprobsWriter, LogprobsForm, join
from trivium_gateway.openai_protocol import (
    UNSUPPORTED_COMPLETION,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from trivium_gateway.prompts import completion_prompts, embeds_prompts, encode_prompts, placed_error
from trivium_gateway.sampling import check_num_logprobs, fit_sampling, given_sampling, shown_finish, truncation_of
from trivium_gateway.stream_extras import StreamExtras
from trivium_gateway.streaming import ChunkEncoder
from trivium_gateway.usage import Usage


class CompletionsEndpoint(GenerationEndpoint[CompletionRequest]):
    """Text in, text out."""

    request_type = CompletionRequest
    unsupported = UNSUPPORTED_COMPLETION
    id_prefix = "cmpl"
    operation = "text_completion"

    async def jobs(self, request: CompletionRequest, engine: EngineClient, info: ModelInfo) -> list[Job]:
        form = self.logprobs_form(request)
        given = given_sampling(request, max_tokens=request.max_tokens, info=info, logprobs=form)
        fallback = default_max_tokens(info)
        placed_prompts = completion_prompts(request, info, await embeds_prompts(request.prompt_embeds))
        prompts = await encode_prompts(placed_prompts, engine, info, truncation_of(given, fallback))
        jobs = []
        for placed, prompt in zip(placed_prompts, prompts, strict=True):
            try:
                fitting = await fit_sampling(given, prompt, info, engine, fallback_max_tokens=fallback)
            except InvalidRequestError as error:
                raise placed_error(error, placed) from None
            jobs.append(Job(prompt, fitting.sampling, fitting.applied))
        return jobs

    def logprobs_form(self, request: CompletionRequest) -> LogprobsForm:
        check_num_logprobs("prompt_logprobs", request.prompt_logprobs)
        check_num_logprobs("logprobs", request.logprobs)
        return LogprobsForm(
            num_top=request.logprobs,
            num_prompt_top=request.prompt_logprobs,
            echo=bool(request.echo),
            shows_special=request.skip_special_tokens is False,
        )

    def response(self, generation: Generation, collected: ChoiceCollector, usage: Usage) -> Completion:
        form, choices = generation.logprobs, []
        for output in collected.outputs:
            text, logprobs = _with_prompt(generation, collected, output)
            choices.append(
                CompletionChoice(
                    index=output.index,
                    text=text,
                    logprobs=logprobs,
                    finish_reason=shown_finish(output.finish_reason),
                    stop_reason=output.stop_reason,
                    prompt_logprobs=UNSET
                    if form.num_prompt_top is None
                    else generation.token_texts.prompt_dicts(
                        generation.prompt_of(output.index),
                        collected.prompt_logprobs_of(output.index, generation.n),
                        form.num_prompt_top,
                    ),
                    prompt_token_ids=generation.prompt_of(output.index).token_ids
                    if generation.returns_token_ids
                    else UNSET,
                    token_ids=output.token_ids if generation.returns_token_ids else UNSET,
                )
            )
        return Completion(
            id=generation.id, created=generation.created, model=generation.model, choices=choices, usage=usage
        )

    def encoder(self, generation: Generation, extras: StreamExtras) -> ChunkEncoder:
        return CompletionChunks(generation, extras)


def _with_prompt(
    generation: Generation, collected: ChoiceCollector, output: CompletionOutput
) -> tuple[str, CompletionLogprobs | None]:
    """Text and log-probabilities of a choice, behind those of its prompt if that is echoed."""
    form = generation.logprobs
    echoed = generation.echoed(output.index) if form.echo else ""
    if form.num_top is None:
        return echoed + output.text, None
    writer, pieces = CompletionLogprobsWriter(generation.token_texts, form), []
    if form.echo:
        of_prompt = collected.prompt_logprobs_of(output.index, generation.n)
        pieces.append(writer.prompt(generation.prompt_of(output.index), echoed, of_prompt))
    pieces.append(writer.tokens(output.token_ids, collected.logprobs[output.index], output.text))
    return echoed + output.text, join(pieces)


class CompletionChunks:
    """Stream events of one completion call. All that does not change from event to event is encoded once."""

    def __init__(self, generation: Generation, extras: StreamExtras) -> None:
        encode = msgspec.json.encode
        self._encode = encode
        self._extras = extras
        self._head = b'data: {"id":%b,"object":"text_completion","created":%d,"model":%b,"choices":[' % (
            encode(generation.id),
            generation.created,
            encode(generation.model),
        )
        self._choices = [b'%b{"index":%d,"text":' % (self._head, choice) for choice in range(generation.num_choices)]
        self._end = extras.plain_end
        self._more = b',"logprobs":null,"finish_reason":null,"stop_reason":null}' + self._end
        self._shown = ShownCompletions(generation) if generation.logprobs.changes_completions else None

    def chunk(self, choice: int, delta: ChoiceDelta) -> bytes:
        if not self._extras.is_plain:
            return self._extended_chunk(choice, delta)
        if self._shown is not None:
            return self._shown_chunk(choice, delta, *self._shown.show(choice, delta))
        if delta.finish_reason is None:
            return self._choices[choice] + self._encode(delta.text) + self._more if delta.text else b""
        return b'%b%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b}%b' % (
            self._choices[choice],
            self._encode(delta.text),
            self._encode(delta.finish_reason.value),
            self._encode(delta.stop_reason),
            self._end,
        )

    def _shown_chunk(self, choice: int, delta: ChoiceDelta, text: str, logprobs: CompletionLogprobs | None) -> bytes:
        if not text and delta.finish_reason is None and (logprobs is None or not logprobs.tokens):
            return b""
        return b'%b%b,"logprobs":%b,"finish_reason":%b,"stop_reason":%b}%b' % (
            self._choices[choice],
            self._encode(text),
            self._encode(logprobs),
            self._encode(delta.finish_reason),
            self._encode(delta.stop_reason),
            self._end,
        )

    def _extended_chunk(self, choice: int, delta: ChoiceDelta) -> bytes:
        """With counts or token ids, which come even where there is no text yet."""
        extras = self._extras
        extras.counts.add(delta)
        text, logprobs = (delta.text, None) if self._shown is None else self._shown.show(choice, delta)
        if not text and delta.finish_reason is None and logprobs is None and not (extras.shows_ids and delta.token_ids):
            return b""
        return b'%b%b,"logprobs":%b,"finish_reason":%b,"stop_reason":%b%b%b}%b' % (
            self._choices[choice],
            self._encode(text),
            self._encode(logprobs),
            self._encode(delta.finish_reason),
            self._encode(delta.stop_reason),
            extras.prompt_ids(choice),
            extras.ids(delta),
            extras.end(),
        )

    def usage(self, usage: Usage) -> bytes:
        return b'%b],"usage":%b}\n\n' % (self._head, self._encode(usage)) if self._extras.include_usage else b""


class ShownCompletions:
    """What a stream shows beside the plain text of its choices: the echoed prompt and log-probabilities."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._writers: dict[int, CompletionLogprobsWriter] = {}  # choice -> its writer, once it has begun
        self._begun: set[int] = set()
        self._prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}  # first choice of a prompt -> of that prompt

    def show(self, choice: int, delta: ChoiceDelta) -> tuple[str, CompletionLogprobs | None]:
        """Text and log-probabilities of one event."""
        form = self._generation.logprobs
        if delta.prompt_logprobs:
            self._prompt_logprobs[choice] = delta.prompt_logprobs
        echoed = self._generation.echoed(choice) if form.echo and choice not in self._begun else None
        self._begun.add(choice)
        text = (echoed or "") + delta.text
        if form.num_top is None:
            return text, None
        if choice not in self._writers:
            self._writers[choice] = CompletionLogprobsWriter(self._generation.token_texts, form)
        writer = self._writers[choice]
        pieces = [] if echoed is None else [writer.prompt(*self._prompt(choice, echoed))]
        pieces.append(writer.tokens(delta.token_ids, delta.logprobs, delta.text))
        return text, join(pieces)

    def _prompt(self, choice: int, echoed: str) -> tuple[EncodedPrompt, str, tuple[TokenLogprobs, ...]]:
        """The other choices of a prompt begin after the first one, whose first delta brings these for all."""
        first = choice - choice % self._generation.n
        return self._generation.prompt_of(choice), echoed, self._prompt_logprobs.get(first, ())
