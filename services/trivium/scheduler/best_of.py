"""`best_of`: more choices are run than returned, and the likeliest of them are delivered when all have ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from trivium.errors import InvalidRequestError, TriviumError
from trivium.inputs import GenerationRequest
from trivium.outputs import ChoiceDelta
from trivium.params import SamplingParams
from trivium.scheduler.output_processor import DeltaSink


def run_all_choices(request: GenerationRequest) -> GenerationRequest:
    """The request that runs `best_of` choices, scored. Those that its caller holds run again, and end the same.

    Raises InvalidRequestError if it is resumed in the middle of a choice.
    """
    sampling = request.sampling
    assert sampling.best_of is not None, "asked for by picks_best only"
    if any(not choice.finished for choice in request.resume):
        raise InvalidRequestError("a request with best_of above n cannot be resumed inside a choice", param="best_of")
    logprobs = 0 if sampling.logprobs is None else sampling.logprobs
    return replace(request, sampling=replace(sampling, n=sampling.best_of, logprobs=logprobs), resume=())


def check_streaming(request: GenerationRequest) -> None:
    """Raise InvalidRequestError if deltas are wanted of choices of which only the best are returned."""
    sampling = request.sampling
    if request.stream and sampling.best_of is not None and sampling.best_of > sampling.n:
        raise InvalidRequestError("best_of above n cannot be streamed: the best are known at the end", param="best_of")


class BestOfSink:
    """A DeltaSink that holds back the choices of one request, and passes on the `n` best: best first, as 0 to n - 1.

    The best have the highest log-probability per token; of equals the lower choice index goes first. Choices in `held`
    are not delivered: their caller has them. The request must not be streamed, so that each choice is one delta.
    """

    def __init__(self, sink: DeltaSink, sampling: SamplingParams, held: Collection[int]) -> None:
        self._sink = sink
        self._sampling = sampling
        self._held = held
        self._choices: dict[int, ChoiceDelta] = {}  # choice index -> the whole choice

    def deliver(self, handle: int, delta: ChoiceDelta) -> None:
        assert delta.finish_reason is not None, "a choice that is not streamed is one delta"
        self._choices[delta.index] = delta
        if len(self._choices) == self._sampling.best_of:
            self._deliver_best(handle)

    def fail(self, handle: int, error: TriviumError) -> None:
        self._sink.fail(handle, error)

    def _deliver_best(self, handle: int) -> None:
        first = self._choices[0]
        best = sorted(self._choices.values(), key=lambda delta: (-logprob_per_token(delta), delta.index))
        for index, delta in enumerate(best[: self._sampling.n]):
            if index not in self._held:
                shown = replace(
                    delta,
                    index=index,
                    logprobs=delta.logprobs if self._sampling.logprobs is not None else (),
                    prompt_logprobs=first.prompt_logprobs if index == 0 else (),
                    num_cached_tokens=first.num_cached_tokens if index == 0 else None,
                )
                self._sink.deliver(handle, shown)


def logprob_per_token(delta: ChoiceDelta) -> float:
    """The score of a whole choice."""
    return sum(value.logprob for value in delta.logprobs) / max(1, len(delta.logprobs))
