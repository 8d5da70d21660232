"""What comes back: deltas from the engine (`ChoiceDelta`), whole results for callers (`RequestOutput`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar


class FinishReason(StrEnum):
    """Why a choice ended. ABORT is never shown to a REST client: the client is gone."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model found a token, and which tokens it found most likely, in falling order.

    Natural logarithms of its own distribution, before penalties, temperature and truncation. rank: 1 for the most
    likely token, 0 where there is no token: a position of a prompt that is an embedding. top_ids, top_logprobs: as
    many as were asked for; they need not hold the token itself.
    """

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()

    @property
    def is_of_token(self) -> bool:
        return self.rank > 0


NO_TOKEN_LOGPROBS = TokenLogprobs(0.0, 0)


@dataclass(frozen=True, slots=True)
class TokenText:
    """What one token stands for, alone. raw: its bytes, which may be a part of a character.

    text: `raw` as text, with U+FFFD for what is no whole character. is_special: not part of the text of an output,
    unless the caller wants to see special tokens. A token that the tokenizer does not know has neither text nor bytes.
    """

    text: str
    raw: bytes
    is_special: bool = False


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithm of a token's probability, rank (1: the most likely), and text if there is a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """News of one choice of one request: tokens and text since the last delta.

    `token_ids` and `text` need not line up: text lags while a character or a stop string is incomplete. The last
    delta of a choice has `finish_reason`; `stop_reason` is then the stop string or stop token id that matched, and
    None for EOS and length.

    logprobs: one for each of `token_ids`, if asked for. prompt_logprobs: of the prompt's tokens from the second on, if
    asked for, in the first delta of choice 0. cumulative_logprob: in the last delta of a beam-search choice, the sum
    of its log-probabilities; of other choices it is the sum of `logprobs`. num_cached_tokens: in the first delta of
    choice 0, once for the request, how many tokens of its (decoder) prompt were found in the prefix cache when it first
    ran; later runs, after a preemption or a crash, do not count, and a choice that is resumed does not tell again.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    cumulative_logprob: float | None = None
    num_cached_tokens: int | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One choice, whole. `token_ids` includes the EOS token if it was generated; `text` does not.

    logprobs: for each token the most likely ones, by token id, and always the token itself; None if not asked for.
    cumulative_logprob: the sum over the tokens.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None

    def add(self, delta: ChoiceDelta) -> None:
        """Append `delta`, which must be of this choice. `logprobs` are left alone: they need the texts of tokens."""
        assert delta.index == self.index, f"delta of choice {delta.index} added to {self.index}"
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs:
            self.cumulative_logprob = sum((value.logprob for value in delta.logprobs), self.cumulative_logprob or 0.0)
        if delta.cumulative_logprob is not None:
            self.cumulative_logprob = delta.cumulative_logprob
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.value
            self.stop_reason = delta.stop_reason


@dataclass(slots=True)
class RequestOutput:
    """The result of one prompt.

    For an encoder-decoder model `prompt` and `prompt_token_ids` are the decoder's, `encoder_prompt` and
    `encoder_prompt_token_ids` the encoder's. prompt_logprobs: as CompletionOutput's; None for the first token, which
    nothing predicts. num_cached_tokens: how many of `prompt_token_ids` were found in the prefix cache when the request
    first ran; None if it was aborted before.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int | None = None


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam, as vLLM's `beam_search` shows it: tokens and text begin with those of the (decoder) prompt."""

    tokens: list[int]
    text: str
    cum_logprob: float
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class PoolingOutput:
    """data: a torch.Tensor, float32: [hidden], or [num_tokens, hidden] where no token is left out."""

    data: Any


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class ScoringOutput:
    """score: cosine of the angle between two vectors."""

    score: float


PooledT = TypeVar("PooledT", PoolingOutput, EmbeddingOutput, ScoringOutput)


@dataclass(slots=True)
class PoolingRequestOutput(Generic[PooledT]):
    """The vector of one prompt, or the score of two, whose ids then follow one another."""

    request_id: str
    outputs: PooledT
    prompt_token_ids: list[int]
    finished: bool = True
