"""POST /v1/chat/completions.

A decoder-only model gets the messages by its chat template. For an encoder-decoder model, which has no notion of a
conversation, the last user message is the encoder input, and a final assistant message with
`continue_final_message=true` is the decoder prompt; messages before them are not read. `prompt_embeds` are whole
prompts (or encoder inputs) of their own, whose choices come ahead of the choices for the messages. Embeddings may also
be parts of a message.

The output limit defaults to the checkpoint's own, else to what the context has room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET

from trivium.chat_embeds import chat_prompt, take_embeds, with_embeds
from trivium.chat_utils import encoder_decoder_chat
from trivium.config import ModelInfo
from trivium.engine import EngineClient
from trivium.errors import InvalidRequestError
from trivium.outputs import ChoiceDelta, CompletionOutput
from trivium.prompts import encode_prompt
from trivium_gateway.endpoint import GenerationEndpoint, Job
from trivium_gateway.errors import relocated
from trivium_gateway.generation import ChoiceCollector, Generation
from trivium_gateway.logprobs import LogprobsForm, chat_logprobs
from trivium_gateway.messages import check_messages, is_continuation
from trivium_gateway.openai_protocol import (
    UNSUPPORTED_CHAT,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatMessage,
    FinishName,
)
from trivium_gateway.prompts import PlacedPrompt, decode, embeds_prompts, with_languages
from trivium_gateway.sampling import check_num_logprobs, fit_sampling, given_sampling, shown_finish, truncation_of
from trivium_gateway.stream_extras import StreamExtras
from trivium_gateway.streaming import ChunkEncoder
from trivium_gateway.tool_calls import CallReader, ToolReading, read_whole
from trivium_gateway.tools import ToolUse, refuse_template_fields, tool_use
from trivium_gateway.usage import Usage

# what a client calls the parts that the layers below name, the longer names first
_PLACES = (("encoder_prompt", "messages"), ("decoder_prompt", "messages"), ("prompt", "messages"))


class ChatEndpoint(GenerationEndpoint[ChatCompletionRequest]):
    """Messages in, one assistant message per choice out."""

    request_type = ChatCompletionRequest
    unsupported = UNSUPPORTED_CHAT
    id_prefix = "chatcmpl"
    operation = "chat"

    async def jobs(self, request: ChatCompletionRequest, engine: EngineClient, info: ModelInfo) -> list[Job]:
        prompts = await embeds_prompts(request.prompt_embeds)
        messages: list[dict[str, Any]] = []
        if request.messages or not prompts:
            messages = check_messages(request.messages, takes_embeds=self._enable_prompt_embeds)
        messages, parts = take_embeds(messages)
        embeds = [await decode(part.value, part.param) for part in parts]
        use = self._tool_use(request)
        continues = bool(messages) and is_continuation(
            messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
        )
        places = list(_PLACES)
        if request.max_completion_tokens is not None:
            places.append(("max_tokens", "max_completion_tokens"))
        if use.grammar is not None:
            places.append((use.grammar.param, "tools"))
        form = self.logprobs_form(request)
        try:
            given = given_sampling(request, max_tokens=_max_tokens(request), info=info, logprobs=form)
            _add_tools(given, use)
            if info.is_encoder_decoder:
                refuse_template_fields(request, info)
            if not messages:
                pass
            elif info.is_encoder_decoder:
                prompt = encoder_decoder_chat(with_embeds(messages, embeds), continues=continues)
                prompts.append(PlacedPrompt(prompt, "messages"))
            else:
                adds_prompt = not continues if request.add_generation_prompt is None else request.add_generation_prompt
                ids = await engine.render(
                    messages,
                    tools=use.shown,
                    add_generation_prompt=adds_prompt,
                    continue_final_message=continues,
                    template_kwargs=request.chat_template_kwargs,
                )
                prompts.append(PlacedPrompt(chat_prompt(ids, embeds), "messages"))
            if len(prompts) > 1 and form.num_prompt_top is not None:
                raise InvalidRequestError("prompt_logprobs are of one prompt", param="prompt_logprobs")
            return [await _job(placed, request, given, engine, info) for placed in prompts]
        except InvalidRequestError as error:
            for part, to in places:
                if (moved := relocated(error, part=part, to=to)) is not error:
                    raise moved from None
            raise

    def logprobs_form(self, request: ChatCompletionRequest) -> LogprobsForm:
        check_num_logprobs("prompt_logprobs", request.prompt_logprobs)
        check_num_logprobs("top_logprobs", request.top_logprobs)
        if request.top_logprobs is not None and not request.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        return LogprobsForm(
            num_top=(request.top_logprobs or 0) if request.logprobs else None, num_prompt_top=request.prompt_logprobs
        )

    def reading(self, request: ChatCompletionRequest) -> ToolReading | None:
        return self._tool_use(request).reading

    def _tool_use(self, request: ChatCompletionRequest) -> ToolUse:
        parser = self._tool_parsers.get(self._routes.base_of(request.model or ""), self._tool_parsers.get(""))
        return tool_use(request, parser)

    def response(self, generation: Generation, collected: ChoiceCollector, usage: Usage) -> ChatCompletion:
        form, texts = generation.logprobs, generation.token_texts
        choices = []
        for output in collected.outputs:
            message, finish_reason = _message(generation, output)
            choices.append(
                ChatChoice(
                    index=output.index,
                    message=message,
                    logprobs=None
                    if form.num_top is None
                    else chat_logprobs(texts, output.token_ids, collected.logprobs[output.index]),
                    finish_reason=finish_reason,
                    stop_reason=output.stop_reason,
                    token_ids=output.token_ids if generation.returns_token_ids else UNSET,
                )
            )
        return ChatCompletion(
            id=generation.id,
            created=generation.created,
            model=generation.model,
            choices=choices,
            usage=usage,
            prompt_token_ids=generation.prompt_of(0).token_ids if generation.returns_token_ids else UNSET,
            prompt_logprobs=UNSET
            if form.num_prompt_top is None
            else texts.prompt_dicts(
                generation.prompt_of(0), collected.prompt_logprobs_of(0, generation.n), form.num_prompt_top
            ),
        )

    def encoder(self, generation: Generation, extras: StreamExtras) -> ChunkEncoder:
        return ChatChunks(generation, extras)


async def _job(
    placed: PlacedPrompt,
    request: ChatCompletionRequest,
    given: Mapping[str, Any],
    engine: EngineClient,
    info: ModelInfo,
) -> Job:
    try:
        prompt = with_languages(placed.prompt, request.source_language, request.target_language)
        encoded = await encode_prompt(prompt, engine, info, truncation=truncation_of(given, None))
        fitting = await fit_sampling(given, encoded, info, engine, fallback_max_tokens=None)
    except InvalidRequestError as error:
        raise relocated(error, part="prompt_embeds", to=placed.param) from None
    return Job(encoded, fitting.sampling, fitting.applied)


def _add_tools(given: dict[str, Any], use: ToolUse) -> None:
    """What the use of tools asks of sampling. Raises InvalidRequestError."""
    if use.grammar is not None:
        if "structured_outputs" in given:
            raise InvalidRequestError(
                "tool_choice says what the output must be, and so does another field; give one of them",
                param="tool_choice",
                code="conflicting_parameters",
            )
        given["structured_outputs"] = use.grammar
    if use.reading is not None and use.reading.shows_special:
        given["skip_special_tokens"] = False


def _message(generation: Generation, output: CompletionOutput) -> tuple[ChatMessage, FinishName]:
    """The message of a complete choice, and why it ended."""
    finish = shown_finish(output.finish_reason)
    if generation.reading is None:
        return ChatMessage(content=output.text), finish
    content, calls, finish = read_whole(generation.reading, output.text, finish)
    return ChatMessage(content=content, tool_calls=calls or UNSET), finish


def _max_tokens(request: ChatCompletionRequest) -> int | None:
    if request.max_completion_tokens is None:
        return request.max_tokens
    if request.max_tokens not in (None, request.max_completion_tokens):
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens differ; give one of them",
            param="max_completion_tokens",
            code="conflicting_parameters",
        )
    return request.max_completion_tokens


class ChatChunks:
    """Stream events of one chat call. All that does not change from event to event is encoded once.

    The first event of each choice names the role; it leaves together with the first news of that choice.
    """

    def __init__(self, generation: Generation, extras: StreamExtras) -> None:
        encode = msgspec.json.encode
        self._encode = encode
        self._extras = extras
        self._head = b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"choices":[' % (
            encode(generation.id),
            generation.created,
            encode(generation.model),
        )
        self._choices = [b'%b{"index":%d,"delta":{' % (self._head, choice) for choice in range(generation.num_choices)]
        self._end = extras.plain_end
        self._more = b'},"logprobs":null,"finish_reason":null,"stop_reason":null}' + self._end
        self._unopened = set(range(generation.num_choices))
        self._texts = None if generation.logprobs.num_top is None else generation.token_texts
        self._readers: list[CallReader] | None = None
        if generation.reading is not None:
            self._readers = [CallReader(generation.reading) for _ in range(generation.num_choices)]

    def chunk(self, choice: int, delta: ChoiceDelta) -> bytes:
        if self._readers is not None:
            return self._read_chunk(choice, delta, self._readers[choice])
        head = self._choices[choice]
        opening = self._opening(choice, delta)
        content = b'"content":' + self._encode(delta.text) if delta.text else b""
        if self._texts is None and self._extras.is_plain and delta.finish_reason is None:
            return opening + head + content + self._more if content else opening
        return self._full_chunk(choice, delta, opening, content, self._encode(delta.finish_reason))

    def _read_chunk(self, choice: int, delta: ChoiceDelta, reader: CallReader) -> bytes:
        """As `chunk`, of a choice that may call tools."""
        news = reader.read(delta.text, is_last=delta.finish_reason is not None)
        fields = [b'"content":' + self._encode(news.content)] if news.content else []
        fields += [b'"tool_calls":' + self._encode(news.calls)] if news.calls else []
        finish = delta.finish_reason and reader.finish_of(shown_finish(delta.finish_reason.value))
        return self._full_chunk(choice, delta, self._opening(choice, delta), b",".join(fields), self._encode(finish))

    def _full_chunk(self, choice: int, delta: ChoiceDelta, opening: bytes, fields: bytes, finish: bytes) -> bytes:
        """opening: what comes first. fields: of the event's `delta`; there may be none. finish: encoded."""
        logprobs, extras = b"null", self._extras
        if not extras.is_plain or self._texts is not None:
            extras.counts.num_output_tokens += len(delta.token_ids)
        if self._texts is not None and delta.token_ids:
            logprobs = self._encode(chat_logprobs(self._texts, delta.token_ids, delta.logprobs))
            fields = fields or b'"content":""'
        elif not fields and delta.finish_reason is None and not (extras.shows_ids and delta.token_ids):
            return opening
        return b'%b%b%b},"logprobs":%b,"finish_reason":%b,"stop_reason":%b%b}%b' % (
            opening,
            self._choices[choice],
            fields,
            logprobs,
            finish,
            self._encode(delta.stop_reason),
            extras.ids(delta),
            extras.end(),
        )

    def _opening(self, choice: int, delta: ChoiceDelta) -> bytes:
        """The event that names the role, if it has not been sent yet: of `delta` it counts what is of the prompt."""
        if choice not in self._unopened:
            return b""
        self._unopened.discard(choice)
        return self._choices[choice] + b'"role":"assistant","content":""' + self._opening_end(choice, delta)

    def _opening_end(self, choice: int, delta: ChoiceDelta) -> bytes:
        if self._extras.is_plain:
            return self._more
        self._extras.counts.add_prompt(delta)
        ids, end = self._extras.prompt_ids(choice), self._extras.end()
        return b'},"logprobs":null,"finish_reason":null,"stop_reason":null}]%b%b' % (ids, end.removeprefix(b"]"))

    def usage(self, usage: Usage) -> bytes:
        return b'%b],"usage":%b}\n\n' % (self._head, self._encode(usage)) if self._extras.include_usage else b""
