"""One API call: the engine requests of all its prompts, run side by side.

Owns the life of the engine iterators: each is closed as soon as it is not needed any more, whether the call is
complete, has failed, was cut by the end of the server, or lost its client.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from trivium.engine import EngineClient
from trivium.errors import EngineUnavailableError, InternalError
from trivium.inputs import EncodedPrompt, GenerationRequest
from trivium.outputs import ChoiceDelta, CompletionOutput, FinishReason, TokenLogprobs
from trivium_gateway.concurrency import run_all
from trivium_gateway.logprobs import LogprobsForm, TokenTexts
from trivium_gateway.metrics import ModelMetrics, metered
from trivium_gateway.tool_calls import ToolReading
from trivium_gateway.tracing import recorded_deltas
from trivium_gateway.usage import TokenCounts, Usage, count_usage


@dataclass(frozen=True, slots=True)
class Generation:
    """What one API call runs. Choices are numbered prompt by prompt: choice `i` is of request `i // n`.

    began_s: when the call came in, on the monotonic clock. metrics: where it is counted. token_texts: of the tokens
    that deltas with log-probabilities name, and of prompts that are shown; known before a sink gets the delta.
    returns_token_ids: whether the response shows those of prompt and output.
    applied_defaults: what the response has to say about them, None for nothing. reading: how calls of tools are read
    out of the texts, None if these are just texts.
    """

    id: str
    created: int  # Unix time, seconds
    model: str
    engine: EngineClient
    requests: tuple[GenerationRequest, ...]
    metrics: ModelMetrics
    began_s: float
    logprobs: LogprobsForm
    token_texts: TokenTexts
    returns_token_ids: bool = False
    applied_defaults: Mapping[str, Any] | None = None
    reading: ToolReading | None = None

    @property
    def n(self) -> int:
        return self.requests[0].sampling.n

    @property
    def is_streamed(self) -> bool:
        return self.requests[0].stream

    @property
    def num_choices(self) -> int:
        return self.n * len(self.requests)

    def prompt_of(self, choice: int) -> EncodedPrompt:
        return self.requests[choice // self.n].prompt

    def echoed(self, choice: int) -> str:
        """What a choice that echoes its prompt begins with: what the output goes on from, as far as it has text."""
        prompt = self.prompt_of(choice)
        if prompt.text is not None:
            return prompt.text
        return self.token_texts.text_of(prompt.own_ids, shows_special=self.logprobs.shows_special)

    def usage(self, counts: TokenCounts) -> Usage:
        return count_usage((request.prompt for request in self.requests), counts)


class DeltaSink(Protocol):
    """Where the deltas of all choices go. `choice` numbers the choices of the whole call."""

    def add(self, choice: int, delta: ChoiceDelta) -> None: ...

    def is_full(self) -> bool: ...

    async def wait_for_room(self) -> None: ...


class ChoiceCollector:
    """Puts the choices of one call together. Never full: the choices are the response."""

    def __init__(self, num_choices: int) -> None:
        self.counts = TokenCounts()
        self.outputs = [CompletionOutput(index=choice) for choice in range(num_choices)]
        self.logprobs: list[list[TokenLogprobs]] = [[] for _ in range(num_choices)]
        self.prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}  # first choice of a prompt -> of that prompt

    def add(self, choice: int, delta: ChoiceDelta) -> None:
        output = self.outputs[choice]
        self.counts.add(delta)
        output.text += delta.text
        output.token_ids.extend(delta.token_ids)
        self.logprobs[choice] += delta.logprobs
        if delta.prompt_logprobs:
            self.prompt_logprobs[choice] = delta.prompt_logprobs
        if delta.finish_reason is not None:
            output.finish_reason = delta.finish_reason.value
            output.stop_reason = delta.stop_reason

    def prompt_logprobs_of(self, choice: int, n: int) -> tuple[TokenLogprobs, ...]:
        """Of the prompt of `choice`, which has `n` choices; the first of them brought these for all."""
        return self.prompt_logprobs.get(choice - choice % n, ())

    def is_full(self) -> bool:
        return False

    async def wait_for_room(self) -> None:
        return None


async def run_generation(generation: Generation, sink: DeltaSink, *watchers: Coroutine[Any, Any, None]) -> None:
    """Run all requests of `generation` to their end.

    A watcher that raises (client gone, server cut) ends them early. Raises the first error of any of them.
    """
    n = generation.n
    with recorded_deltas(generation, sink) as recorded, metered(generation, recorded) as counted:
        pumps = [
            _pump(generation, request, counted, first_choice=n * position)
            for position, request in enumerate(generation.requests)
        ]
        await run_all(pumps, beside=watchers)


async def _pump(generation: Generation, request: GenerationRequest, sink: DeltaSink, *, first_choice: int) -> None:
    num_unfinished = request.sampling.n
    form, texts = generation.logprobs, generation.token_texts
    if form.echo or form.num_prompt_top is not None:
        await texts.load(request.prompt.token_ids)
    # The contract allows closing early, which plain iterators cannot do.
    async with aclosing(generation.engine.generate(request)) as deltas:
        async for delta in deltas:
            if delta.logprobs or delta.prompt_logprobs:
                await texts.load_delta(delta)
            if delta.finish_reason is not None:
                if delta.finish_reason is FinishReason.ABORT:
                    raise EngineUnavailableError("the request was aborted by the server", code="aborted")
                num_unfinished -= 1
            sink.add(first_choice + delta.index, delta)
            if sink.is_full():
                await sink.wait_for_room()
    if num_unfinished:
        raise InternalError("the engine ended the request before it was complete")
