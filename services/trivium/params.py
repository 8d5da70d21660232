"""How tokens are chosen: `SamplingParams`, validated once for REST, gRPC and offline use.

Names, defaults and ranges are vLLM's; what vLLM does not have (DRY, XTC, top-a, typical, epsilon and eta cutoff) has
the names and units of Aphrodite. A value out of range raises InvalidRequestError with the field's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from enum import IntEnum

from trivium.errors import InvalidRequestError
from trivium.structured_outputs import StructuredOutputsParams

MAX_N = 16
MAX_STOP = 16
MAX_STOP_CHARS = 256
MAX_TOKEN_IDS = 1024  # ids in one list
MAX_ALLOWED_TOKEN_IDS = 16384
MAX_LOGIT_BIAS = 1024
MAX_BIAS = 100.0
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_BAD_WORD_TOKENS = 256
MAX_NGRAM_SIZE = 256
MAX_DRY_ALLOWED_LENGTH = 256
MAX_LOGPROBS = 20
MAX_BEAM_WIDTH = 16
MAX_LOOKUP_TOKENS = 32
GREEDY_EPSILON = 1e-5  # a temperature below this is greedy
MAX_TOP_K = 2**31 - 1
_INT64 = 2**63
_MAX_INT32 = 2**31 - 1

_INT_RANGES: dict[str, tuple[int, int]] = {
    "n": (1, MAX_N),
    "top_k": (0, MAX_TOP_K),
    "min_tokens": (0, _MAX_INT32),
    "no_repeat_ngram_size": (0, MAX_NGRAM_SIZE),
    "encoder_no_repeat_ngram_size": (0, MAX_NGRAM_SIZE),
    "prompt_lookup_num_tokens": (0, MAX_LOOKUP_TOKENS),
    "dry_allowed_length": (0, MAX_DRY_ALLOWED_LENGTH),
    "dry_range": (0, _MAX_INT32),
}
_FLOAT_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-6, 1e6),  # positive and finite, and far enough from where float32 ends
    "encoder_repetition_penalty": (1e-6, 1e6),
    "typical_p": (0.0, 1.0),
    "top_a": (0.0, 1e6),
    "epsilon_cutoff": (0.0, 1e4),
    "eta_cutoff": (0.0, 1e4),
    "dry_multiplier": (0.0, 1e6),
    "xtc_threshold": (0.0, 1.0),
    "xtc_probability": (0.0, 1.0),
}
_FLOAT_RANGES_LOW_OPEN: dict[str, tuple[float, float]] = {"top_p": (0.0, 1.0), "dry_base": (1.0, 1e6)}
_MAX_TRUNCATED = 2**24  # tokens; far above any context
_BOOLS = ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens")


# vLLM's names that have no meaning here, in the order of the InitVars of SamplingParams: name -> (what means "not
# used", why it is refused, what to do instead)
REFUSED_SAMPLING: dict[str, tuple[tuple[object, ...], str]] = {
    "logits_processors": (
        (None, (), []),
        "code of a caller does not run in the model's step: use logit_bias, bad_words",
    ),
    "spaces_between_special_tokens": ((None, True), "special tokens are shown as the tokenizer shows them"),
    "flat_logprobs": ((None, False), "log-probabilities are dicts by token id"),
    "logprob_token_ids": ((None, (), []), "logprobs reports the most likely tokens"),
    "use_beam_search": ((None, False), "use BeamSearchParams"),
    "skip_reading_prefix_cache": ((None, False), "use a cache_salt of its own, or enable_prefix_caching=False"),
    "stream_interval": ((None, 1), "every token is told as soon as it is there"),
    "thinking_token_budget": ((None, -1), "reasoning is not told apart from the rest: use max_tokens"),
    "repetition_detection": ((None,), "use no_repeat_ngram_size or repetition_penalty"),
    "extra_args": ((None, {}), "there is nothing that reads them"),
}


class RequestOutputKind(IntEnum):
    """What the outputs of a stream hold: everything so far, what is new, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSettings:
    """Beam search as transformers does it (`generate` with `num_beams`).

    width: beams kept at each step. length_penalty: a hypothesis scores sum of log-probabilities / length **
    length_penalty. early_stopping: True stops at `width` hypotheses; False when the best live beam cannot win at its
    present length; "never" when it cannot win at any length. num_groups, diversity_penalty: diverse beam search
    (https://arxiv.org/abs/1610.02424): groups of width / num_groups beams, each avoiding the tokens of those before it.
    """

    width: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_int("beam_width", self.width, 1, MAX_BEAM_WIDTH)
        check_float("length_penalty", self.length_penalty, -100.0, 100.0)
        if self.early_stopping not in (True, False, "never") or isinstance(self.early_stopping, (int, float)) != (
            isinstance(self.early_stopping, bool)
        ):
            raise InvalidRequestError(
                f"early_stopping must be true, false or 'never', got {self.early_stopping!r:.40}",
                param="early_stopping",
            )
        check_int("num_beam_groups", self.num_groups, 1, self.width)
        if self.width % self.num_groups:
            raise InvalidRequestError(
                f"num_beam_groups ({self.num_groups}) must divide beam_width ({self.width})", param="num_beam_groups"
            )
        check_float("diversity_penalty", self.diversity_penalty, 0.0, 100.0)
        if self.diversity_penalty and self.num_groups == 1:
            raise InvalidRequestError(
                "diversity_penalty needs num_beam_groups above 1: it keeps groups apart", param="diversity_penalty"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one generation. How they act together, and in which order: `executor/sampler.py`.

    n: choices per prompt. best_of: choices to pick the `n` with the highest log-probability per token from; None is
    `n`. temperature: 0 is greedy. top_k: 0 or -1
    keeps all. max_tokens: None means up to the model's limit. seed: any int64; None and -1 draw
    one.
    stop: strings that end a choice and are not part of its text unless `include_stop_str_in_output`.
    min_tokens: neither EOS nor a stop token id is chosen before so many tokens.

    presence_penalty and frequency_penalty look at the output, all other penalties at prompt and output (of an
    encoder-decoder model: of the decoder). encoder_repetition_penalty favours the tokens of the encoder input and
    encoder_no_repeat_ngram_size forbids its n-grams. logit_bias: token id -> what is added to its logit.
    allowed_token_ids: nothing else is chosen; None allows all. bad_words: strings that are not generated;
    `bad_words_token_ids` are the sequences they are made of, set by `resolve_bad_words`. A ban that would leave no
    token at all is lifted for that step; a bad word that is nothing but an EOS does not count, as in transformers.
    suppress_tokens are never chosen, begin_suppress_tokens not as the first token that is not forced.
    forced_bos_token_id: what follows a decoder prompt of one token, the start token; None leaves it to the model. After
    longer decoder prompts nothing is forced, as in transformers. It and encoder_* are of encoder-decoder models only.

    logprobs: how many of the most likely tokens to report at each position, beside the chosen one (0: only that);
    prompt_logprobs: the same for the prompt. They are of the model's own distribution, before all of the above.
    prompt_lookup_num_tokens: how many tokens a step may guess from encoder input, prompt and output, 0 for none. It
    changes the speed, not the output; with logprobs or structured_outputs nothing is guessed.
    structured_outputs: what the output must be. Its end ends the output, also with `ignore_eos` and before
    `min_tokens`; a ban that would leave no token of it is lifted.
    beam: beam search instead of sampling; `n` of its hypotheses are returned, and the temperature is 0.
    truncate_prompt_tokens: how many tokens of the prompt (of the encoder input) to keep, -1 for what the model takes;
    None refuses a prompt that is too long. truncation_side: which end goes; None is "left", for encoder inputs "right".
    What the tokenizer adds at both ends of a text stays. output_kind: for streams offline (`AsyncLLM`).

    epsilon_cutoff, eta_cutoff: in units of 1e-4. dry_*: a token that would repeat what followed an earlier copy of
    the last `length` tokens loses dry_multiplier * dry_base ** (length - dry_allowed_length), from dry_allowed_length
    on, within the last dry_range tokens (0: all of them); matches do not reach across `dry_sequence_breaker_ids`.
    xtc_*: with xtc_probability, all tokens that have at least the probability xtc_threshold are excluded, but for the
    least likely of them.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_repetition_penalty: float = 1.0
    encoder_no_repeat_ngram_size: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_a: float = 0.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0
    dry_sequence_breaker_ids: tuple[int, ...] = field(default=())
    xtc_threshold: float = 0.1
    xtc_probability: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = field(default=())
    bad_words_token_ids: tuple[tuple[int, ...], ...] = field(default=())
    suppress_tokens: tuple[int, ...] = field(default=())
    begin_suppress_tokens: tuple[int, ...] = field(default=())
    forced_bos_token_id: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    beam: BeamSettings | None = None
    prompt_lookup_num_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())
    stop_token_ids: tuple[int, ...] = field(default=())
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    detokenize: bool = True
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logits_processors: InitVar[object] = None
    spaces_between_special_tokens: InitVar[object] = None
    flat_logprobs: InitVar[object] = None
    logprob_token_ids: InitVar[object] = None
    use_beam_search: InitVar[object] = None
    skip_reading_prefix_cache: InitVar[object] = None
    stream_interval: InitVar[object] = None
    thinking_token_budget: InitVar[object] = None
    repetition_detection: InitVar[object] = None
    extra_args: InitVar[object] = None

    def __post_init__(self, *refused: object) -> None:
        for (name, (unused, reason)), value in zip(REFUSED_SAMPLING.items(), refused, strict=True):
            if value not in unused:
                raise InvalidRequestError(
                    f"{name} is not supported: {reason}", param=name, code="unsupported_parameter"
                )
        self._normalise()
        for name, (low, high) in _INT_RANGES.items():
            check_int(name, getattr(self, name), low, high)
        for name, bounds in _FLOAT_RANGES.items():
            check_float(name, getattr(self, name), *bounds)
        for name, bounds in _FLOAT_RANGES_LOW_OPEN.items():
            check_float(name, getattr(self, name), *bounds, low_open=True)
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false, got {getattr(self, name)!r:.40}", param=name)
        if self.seed is not None:
            check_int("seed", self.seed, -_INT64, _INT64 - 1)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1, _MAX_INT32)
        if self.forced_bos_token_id is not None:
            check_int("forced_bos_token_id", self.forced_bos_token_id, 0, _MAX_INT32)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.truncate_prompt_tokens not in (None, -1):
            check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, _MAX_TRUNCATED)
        if self.truncation_side not in (None, "left", "right"):
            raise InvalidRequestError(
                f"truncation_side must be 'left' or 'right', got {self.truncation_side!r:.40}", param="truncation_side"
            )
        if not isinstance(self.output_kind, RequestOutputKind):
            raise InvalidRequestError(
                f"output_kind must be a RequestOutputKind, got {self.output_kind!r:.40}", param="output_kind"
            )
        self._check_together()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    @property
    def heeds_eos(self) -> bool:
        """Whether an EOS ends the output. Where it has a structure, EOS is not chosen before that is complete."""
        return not self.ignore_eos or self.structured_outputs is not None

    @property
    def min_tokens_to_eos(self) -> int:
        """From how many tokens on an EOS ends the output."""
        return self.min_tokens if self.structured_outputs is None else 0

    @property
    def num_lookup_tokens(self) -> int:
        """How many tokens a step may guess; none where the state of a row must follow every token."""
        return self.prompt_lookup_num_tokens if self.logprobs is None and self.structured_outputs is None else 0

    @property
    def has_stopping_beams(self) -> bool:
        """Whether beams end by stop strings, for which the executor must know what its tokens say."""
        return self.beam is not None and bool(self.stop)

    @property
    def needs_preparation(self) -> bool:
        """Whether the executor must have something ready before it can run this: a grammar, or the texts of tokens."""
        return self.structured_outputs is not None or self.has_stopping_beams

    @property
    def picks_best(self) -> bool:
        """Whether more choices are run than returned. Greedy choices are all equal: any `n` of them are the best."""
        return self.best_of is not None and self.best_of > self.n and not self.is_greedy

    def _normalise(self) -> None:
        """Give lists their one form, checked."""
        set_field = object.__setattr__
        set_field(self, "stop", _as_stop(self.stop))
        set_field(self, "stop_token_ids", _as_ids(self.stop_token_ids, "stop_token_ids"))
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            set_field(self, name, _as_ids(getattr(self, name), name))
        set_field(self, "dry_sequence_breaker_ids", _as_ids(self.dry_sequence_breaker_ids, "dry_sequence_breaker_ids"))
        if self.allowed_token_ids is not None:
            allowed = _as_ids(self.allowed_token_ids, "allowed_token_ids", limit=MAX_ALLOWED_TOKEN_IDS)
            if not allowed:
                raise InvalidRequestError("allowed_token_ids must not be empty", param="allowed_token_ids")
            set_field(self, "allowed_token_ids", allowed)
        set_field(self, "bad_words", _as_bad_words(self.bad_words))
        set_field(self, "bad_words_token_ids", _as_sequences(self.bad_words_token_ids))
        set_field(self, "logit_bias", _as_bias(self.logit_bias))
        if self.top_k == -1:
            set_field(self, "top_k", 0)
        if self.seed == -1:
            set_field(self, "seed", None)

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must not exceed max_tokens, got {self.min_tokens} > {self.max_tokens}", param="min_tokens"
            )
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True", param="stop")
        if self.best_of is not None:
            check_int("best_of", self.best_of, self.n, MAX_N)
        if self.structured_outputs is not None:
            self._check_structured_outputs(self.structured_outputs)
        if self.beam is not None:
            self._check_beam(self.beam)

    def _check_structured_outputs(self, structured_outputs: object) -> None:
        if not isinstance(structured_outputs, StructuredOutputsParams):
            raise InvalidRequestError(
                f"structured_outputs must be StructuredOutputsParams, got {type(structured_outputs).__name__}",
                param="structured_outputs",
            )
        if self.allowed_token_ids is not None:
            raise InvalidRequestError(
                "allowed_token_ids and structured_outputs both say what may be generated; give one of them",
                param="allowed_token_ids",
                code="conflicting_parameters",
            )

    def _check_beam(self, beam: BeamSettings) -> None:
        if not self.is_greedy:
            raise InvalidRequestError("beam search takes no temperature: set it to 0", param="temperature")
        if self.prompt_lookup_num_tokens:
            raise InvalidRequestError("beam search guesses no tokens", param="prompt_lookup_num_tokens")
        if self.n > beam.width:
            raise InvalidRequestError(f"n ({self.n}) must not exceed the number of beams ({beam.width})", param="n")


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise InvalidRequestError unless `value` is an int (no bool) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(f"{name} must be an integer in [{low}, {high}], got {value!r:.40}", param=name)


def check_float(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise InvalidRequestError unless `value` is a finite number in [low, high], or (low, high] with `low_open`."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not low <= value <= high or (low_open and value == low):  # type: ignore[operator]
        bracket = "(" if low_open else "["
        raise InvalidRequestError(f"{name} must be a number in {bracket}{low}, {high}], got {value!r:.40}", param=name)


def _as_stop(stop: object) -> tuple[str, ...]:
    items = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(items, Sequence) or len(items) > MAX_STOP:
        raise InvalidRequestError(
            f"stop must be a string or a list of at most {MAX_STOP} strings", param="stop", code="invalid_stop"
        )
    for item in items:
        if not isinstance(item, str) or not 1 <= len(item) <= MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"each stop string must have 1 to {MAX_STOP_CHARS} characters, got {item!r:.40}",
                param="stop",
                code="invalid_stop",
            )
    return tuple(items)


def _as_ids(ids: object, name: str, *, limit: int = MAX_TOKEN_IDS) -> tuple[int, ...]:
    items = () if ids is None else ids
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)) or len(items) > limit:
        raise InvalidRequestError(f"{name} must be a list of at most {limit} token ids", param=name)
    for token_id in items:
        check_int(name, token_id, 0, _MAX_INT32)
    return tuple(dict.fromkeys(items))


def _as_bad_words(words: object) -> tuple[str, ...]:
    items = () if words is None else words
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)) or len(items) > MAX_BAD_WORDS:
        raise InvalidRequestError(f"bad_words must be a list of at most {MAX_BAD_WORDS} strings", param="bad_words")
    for item in items:
        if not isinstance(item, str) or len(item) > MAX_BAD_WORD_CHARS or not item.strip():
            raise InvalidRequestError(
                f"each of bad_words must have 1 to {MAX_BAD_WORD_CHARS} characters that are not only spaces, "
                f"got {item!r:.40}",
                param="bad_words",
            )
    return tuple(dict.fromkeys(items))


def _as_sequences(sequences: object) -> tuple[tuple[int, ...], ...]:
    """Token sequences of bad words: each word has at most two, with and without a space before it."""
    name = "bad_words_token_ids"
    items = () if sequences is None else sequences
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)) or len(items) > 2 * MAX_BAD_WORDS:
        raise InvalidRequestError(f"{name} must be a list of at most {2 * MAX_BAD_WORDS} lists of ids", param=name)
    for ids in items:
        if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)) or not 1 <= len(ids) <= MAX_BAD_WORD_TOKENS:
            raise InvalidRequestError(f"{name} must hold lists of 1 to {MAX_BAD_WORD_TOKENS} ids", param=name)
        for token_id in ids:
            check_int(name, token_id, 0, _MAX_INT32)
    return tuple(dict.fromkeys(tuple(ids) for ids in items))


def _as_bias(bias: object) -> dict[int, float]:
    items = {} if bias is None else bias
    if not isinstance(items, Mapping) or len(items) > MAX_LOGIT_BIAS:
        raise _bias_error(f"logit_bias must map at most {MAX_LOGIT_BIAS} token ids to numbers")
    for token_id, value in items.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id <= _MAX_INT32:
            raise _bias_error(f"logit_bias: {token_id!r:.40} is not a token id")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not -MAX_BIAS <= value <= MAX_BIAS:
            raise _bias_error(f"logit_bias of token {token_id} must be in [-{MAX_BIAS}, {MAX_BIAS}], got {value!r:.40}")
    return {token_id: float(value) for token_id, value in items.items()}


def _bias_error(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="logit_bias", code="invalid_logit_bias")
