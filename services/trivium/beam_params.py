"""`BeamSearchParams`: beam search offline, in vLLM's names and in those of transformers' `generate`.

A value out of range raises InvalidRequestError under the name that was given, an unknown name TypeError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

from trivium.errors import InvalidRequestError, rename_params
from trivium.params import BeamSettings, SamplingParams, check_int
from trivium.structured_outputs import StructuredOutputsParams

_REQUIRED: Any = object()
_MAX_LENGTH = 2**31 - 1
_AS_SAMPLING = (
    "ignore_eos",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "bad_words",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "allowed_token_ids",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "logprobs",
    "structured_outputs",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Parameters of one beam search. What is not explained here means what it means in SamplingParams, BeamSettings.

    beam_width and max_tokens are required; max_tokens=None goes up to the model's limit. num_return_sequences: how many
    hypotheses to return, best first; one, as transformers' `generate`, where vLLM's `beam_search` returns all.
    temperature: 0, nothing else.

    num_beams, max_new_tokens and min_new_tokens are other names of beam_width, max_tokens and min_tokens, for the
    constructor only. max_length and min_length take the place of max_tokens and min_tokens: they count the (decoder)
    prompt, too, start token included, so only `to_sampling_params(num_prompt_tokens=...)` can tell what they mean.
    """

    beam_width: int = _REQUIRED
    max_tokens: int | None = _REQUIRED
    min_tokens: int = 0
    max_length: int | None = None
    min_length: int | None = None
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_repetition_penalty: float = 1.0
    encoder_no_repeat_ngram_size: int = 0
    bad_words: tuple[str, ...] = field(default=())
    suppress_tokens: tuple[int, ...] = field(default=())
    begin_suppress_tokens: tuple[int, ...] = field(default=())
    forced_bos_token_id: int | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = field(default=())
    stop_token_ids: tuple[int, ...] = field(default=())
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    num_beams: InitVar[int | None] = None
    max_new_tokens: InitVar[int | None] = None
    min_new_tokens: InitVar[int | None] = None

    def __post_init__(self, num_beams: int | None, max_new_tokens: int | None, min_new_tokens: int | None) -> None:
        names = {"n": "num_return_sequences"}
        if num_beams is not None:
            self._take("beam_width", _REQUIRED, num_beams, "num_beams", names)
        if max_new_tokens is not None:
            self._take("max_tokens", _REQUIRED, max_new_tokens, "max_new_tokens", names)
        if min_new_tokens is not None:
            self._take("min_tokens", 0, min_new_tokens, "min_new_tokens", names)
        self._check_lengths()
        for name in ("beam_width", "max_tokens"):
            if getattr(self, name) is _REQUIRED:
                raise TypeError(f"BeamSearchParams.__init__() missing a required keyword-only argument: {name!r}")
        if isinstance(self.temperature, bool) or self.temperature != 0:
            raise InvalidRequestError(
                f"beam search takes no temperature: it must be 0, got {self.temperature!r:.40}", param="temperature"
            )
        sampling = self._sampling(self.max_tokens, self.min_tokens, names)
        for name in _AS_SAMPLING:
            object.__setattr__(self, name, getattr(sampling, name))

    def to_sampling_params(self, *, num_prompt_tokens: int | None = None) -> SamplingParams:
        """The same search for the engine.

        num_prompt_tokens: the length of the prompt, of an encoder-decoder model the decoder's with its start token.
        Raises InvalidRequestError if max_length or min_length is set and the length is not told or leaves no room.
        """
        max_tokens, min_tokens = self.max_tokens, self.min_tokens
        names = {"n": "num_return_sequences"}
        for name in ("max_length", "min_length"):
            if getattr(self, name) is not None and num_prompt_tokens is None:
                raise InvalidRequestError(
                    f"{name} counts the prompt, too, whose length is not known here: give "
                    f"{name.replace('length', 'tokens')} instead",
                    param=name,
                )
        if self.max_length is not None and num_prompt_tokens is not None:
            max_tokens, names["max_tokens"] = self.max_length - num_prompt_tokens, "max_length"
            if max_tokens < 1:
                raise InvalidRequestError(
                    f"max_length ({self.max_length}) leaves no room after a prompt of {num_prompt_tokens} tokens",
                    param="max_length",
                )
        if self.min_length is not None and num_prompt_tokens is not None:
            min_tokens, names["min_tokens"] = max(self.min_length - num_prompt_tokens, 0), "min_length"
        return self._sampling(max_tokens, min_tokens, names)

    def _take(self, name: str, unset: object, value: int, alias: str, names: dict[str, str]) -> None:
        """Set field `name` from its other name, unless it has a value of its own."""
        if getattr(self, name) not in (unset, value):
            raise InvalidRequestError(f"{name} and {alias} differ; give one of them", param=alias)
        object.__setattr__(self, name, value)
        names[name] = alias

    def _check_lengths(self) -> None:
        if self.max_length is not None:
            check_int("max_length", self.max_length, 2, _MAX_LENGTH)
            if self.max_tokens not in (_REQUIRED, None):
                raise InvalidRequestError(
                    "max_length and max_tokens are both set; give one of them", param="max_length"
                )
            object.__setattr__(self, "max_tokens", None)
        if self.min_length is not None:
            check_int("min_length", self.min_length, 0, _MAX_LENGTH)
            if self.min_tokens != 0:
                raise InvalidRequestError(
                    "min_length and min_tokens are both set; give one of them", param="min_length"
                )

    def _sampling(self, max_tokens: int | None, min_tokens: int, names: Mapping[str, str]) -> SamplingParams:
        """Raises InvalidRequestError with the names that `names` has for those of SamplingParams."""
        try:
            beam = BeamSettings(
                width=self.beam_width,
                length_penalty=self.length_penalty,
                early_stopping=self.early_stopping,
                num_groups=self.num_beam_groups,
                diversity_penalty=self.diversity_penalty,
            )
            settings: dict[str, Any] = {name: getattr(self, name) for name in _AS_SAMPLING}
            return SamplingParams(
                n=self.num_return_sequences,
                temperature=0.0,
                beam=beam,
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                **settings,
            )
        except InvalidRequestError as error:
            raise rename_params(error, names) from None
