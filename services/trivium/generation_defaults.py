"""What a request leaves unset: filled in from the checkpoint's generation_config.json, the same at every front door.

| in the file | fills | for |
|---|---|---|
| `max_new_tokens`, else `max_length` less the decoder prompt | `max_tokens` | all; `max_length`: encoder-decoder |
| `min_new_tokens`, else `min_length` less the decoder prompt | `min_tokens` | all; `min_length`: encoder-decoder |
| `num_beams`, `length_penalty`, `early_stopping` | `beam` | encoder-decoder, unless request or file sample |
| `no_repeat_ngram_size`, `repetition_penalty` | themselves | all |
| `encoder_no_repeat_ngram_size`, `encoder_repetition_penalty` | themselves | encoder-decoder |
| `temperature`, `top_k`, `top_p`, `min_p`, `typical_p` | themselves | where something is sampled |

An encoder-decoder model samples if the request has a temperature or the file says `do_sample`; else it is greedy, or
searches with beams, as in transformers. A decoder-only model takes the file's temperature, else 1, as in vLLM.
`suppress_tokens`, `begin_suppress_tokens` and `bad_words_ids` apply to every request (`with_necessities`).

Pure: knows no tokenizer and no transport. `sampling_tokens.complete_sampling` is this with a tokenizer at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trivium.config import GenerationDefaults, ModelInfo
from trivium.errors import ContextLengthError, InvalidRequestError
from trivium.inputs import EncodedPrompt
from trivium.params import GREEDY_EPSILON, MAX_BEAM_WIDTH, BeamSettings, SamplingParams, check_int
from trivium.prompts import resolve_max_tokens

MAX_TOKENS = 16  # of a decoder-only model, where neither request nor checkpoint have a limit, as OpenAI documents
MAX_TOKENS_ENCODER_DECODER = 256  # its output is as long as its input asks for
TRANSFORMERS_TOP_K = 50  # where a file says do_sample and nothing else

_MAX_LENGTH = 2**31 - 1
_LENGTH_FIELDS = ("max_tokens", "min_tokens", "max_length", "min_length")
# request field -> (field of BeamSettings, the value that means the same without beams)
_BEAM_FIELDS: dict[str, tuple[str, object]] = {
    "length_penalty": ("length_penalty", 1),
    "early_stopping": ("early_stopping", False),
    "num_beam_groups": ("num_groups", 1),
    "diversity_penalty": ("diversity_penalty", 0),
}
_FILLED = ("no_repeat_ngram_size", "repetition_penalty")
_FILLED_ENCODER_DECODER = (*_FILLED, "encoder_no_repeat_ngram_size", "encoder_repetition_penalty")
_FILLED_SAMPLING = ("top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True, slots=True)
class ResolvedSampling:
    """Complete parameters, and what of them came from the checkpoint: name in generation_config.json -> value."""

    sampling: SamplingParams
    applied: Mapping[str, Any] = field(default_factory=dict)


def default_max_tokens(info: ModelInfo) -> int:
    """The output limit where neither request nor checkpoint have one."""
    return MAX_TOKENS_ENCODER_DECODER if info.is_encoder_decoder else MAX_TOKENS


def resolve_sampling(
    given: Mapping[str, Any], prompt: EncodedPrompt, info: ModelInfo, *, fallback_max_tokens: int | None
) -> ResolvedSampling:
    """`given` completed by the defaults of model `info`, for one prompt.

    given: what the request says, by the names of SamplingParams; `max_length` and `min_length` (decoder prompt
    included) and `num_beams`, `length_penalty`, `early_stopping`, `num_beam_groups` and `diversity_penalty` stand for
    `max_tokens`, `min_tokens` and `beam`. An explicit `max_tokens` of None is the room in the context, `beam` of None
    no beams. fallback_max_tokens: where there is no other limit; None is the room, too.

    What was given must fit; a default is cut to what fits. Raises InvalidRequestError and ContextLengthError.
    """
    defaults, applied = info.generation_defaults, dict[str, Any]()
    fields = {name: value for name, value in given.items() if name not in (*_LENGTH_FIELDS, *_BEAM_FIELDS, "num_beams")}
    fields["beam"] = beam = resolve_beam(given, info, applied)
    if "temperature" not in given:
        fields["temperature"] = 0.0 if beam is not None else _default_temperature(info, applied)
    _fill(fields, _FILLED_ENCODER_DECODER if info.is_encoder_decoder else _FILLED, defaults, applied)
    if not isinstance(fields["temperature"], (int, float)) or fields["temperature"] >= GREEDY_EPSILON:
        _fill(fields, _FILLED_SAMPLING, defaults, applied)
        if info.is_encoder_decoder and defaults.do_sample and "top_k" not in fields:
            fields["top_k"] = TRANSFORMERS_TOP_K
    return ResolvedSampling(_with_lengths(fields, given, prompt, info, fallback_max_tokens, applied), applied)


def with_necessities(sampling: SamplingParams, prompt: EncodedPrompt, info: ModelInfo) -> SamplingParams:
    """`sampling` with the tokens that model `info` must never generate, and the one that `prompt` makes it begin with.

    Raises InvalidRequestError if `sampling` forces another first token than the target language does.
    """
    defaults, forced = info.generation_defaults, sampling.forced_bos_token_id
    if prompt.forced_bos_token_id is not None and forced not in (None, prompt.forced_bos_token_id):
        raise InvalidRequestError(
            f"target_language is token {prompt.forced_bos_token_id}, but forced_bos_token_id is {forced}",
            param="forced_bos_token_id",
            code="conflicting_parameters",
        )
    return replace(
        sampling,
        suppress_tokens=(*sampling.suppress_tokens, *defaults.suppress_tokens),
        begin_suppress_tokens=(*sampling.begin_suppress_tokens, *defaults.begin_suppress_tokens),
        bad_words_token_ids=(*sampling.bad_words_token_ids, *defaults.bad_words_ids),
        forced_bos_token_id=forced if prompt.forced_bos_token_id is None else prompt.forced_bos_token_id,
    )


def default_sampling_params(info: ModelInfo) -> SamplingParams:
    """The parameters of a request that sets nothing, for the shortest prompt of model `info`."""
    prompt = EncodedPrompt((0,), encoder_token_ids=(0,)) if info.is_encoder_decoder else EncodedPrompt((0,))
    return resolve_sampling({}, prompt, info, fallback_max_tokens=default_max_tokens(info)).sampling


def resolve_beam(given: Mapping[str, Any], info: ModelInfo, applied: dict[str, Any]) -> BeamSettings | None:
    """The beam search of a request, None for none. What comes from the checkpoint is noted in `applied`."""
    if "beam" in given:
        beam: BeamSettings | None = given["beam"]
        return beam
    defaults = info.generation_defaults
    num_beams = given.get("num_beams")
    if num_beams is None and info.is_encoder_decoder and not _samples(given, defaults):
        num_beams = defaults.num_beams
        if num_beams is not None:
            applied["num_beams"] = num_beams
    if num_beams is not None:
        check_int("num_beams", num_beams, 1, MAX_BEAM_WIDTH)
    if num_beams is None or num_beams == 1:
        for name, (_, neutral) in _BEAM_FIELDS.items():
            if given.get(name, neutral) != neutral:
                raise InvalidRequestError(f"{name} needs beam search: set num_beams above 1", param=name)
        return None
    fields = {name: value for name, value in given.items() if name in _BEAM_FIELDS}
    _fill(fields, ("length_penalty", "early_stopping"), defaults, applied)
    return BeamSettings(width=num_beams, **{_BEAM_FIELDS[name][0]: value for name, value in fields.items()})


def _samples(given: Mapping[str, Any], defaults: GenerationDefaults) -> bool:
    """Whether a request to an encoder-decoder model draws tokens."""
    temperature = given.get("temperature")
    return bool(defaults.do_sample) if temperature is None else temperature >= GREEDY_EPSILON


def _default_temperature(info: ModelInfo, applied: dict[str, Any]) -> float:
    defaults = info.generation_defaults
    if info.is_encoder_decoder:
        applied["do_sample"] = bool(defaults.do_sample)
        if not defaults.do_sample:
            return 0.0
    if defaults.temperature is None:
        return 1.0
    applied["temperature"] = defaults.temperature
    return defaults.temperature


def _fill(
    fields: dict[str, Any], names: tuple[str, ...], defaults: GenerationDefaults, applied: dict[str, Any]
) -> None:
    for name in names:
        value = getattr(defaults, name)
        if name not in fields and value is not None:
            fields[name] = applied[name] = value


def _with_lengths(
    fields: Mapping[str, Any],
    given: Mapping[str, Any],
    prompt: EncodedPrompt,
    info: ModelInfo,
    fallback_max_tokens: int | None,
    applied: dict[str, Any],
) -> SamplingParams:
    """`fields` as parameters, with `max_tokens` and `min_tokens`."""
    num_prompt_tokens = len(prompt.token_ids)
    given_max, max_name = _given_length(given, "max", num_prompt_tokens)
    given_min, min_name = _given_length(given, "min", num_prompt_tokens)
    if given_max is not None and given_min is not None and given_min > given_max:
        raise InvalidRequestError(
            f"{min_name} ({given[min_name]}) must not exceed {max_name} ({given[max_name]})", param=min_name
        )
    if max_name == "max_length" and given["max_length"] > info.max_model_len:
        raise ContextLengthError(
            f"max_length is {given['max_length']}, the model's context holds {info.max_model_len}", param="max_length"
        )
    sampling = SamplingParams(**{**fields, "max_tokens": given_max, "min_tokens": given_min or 0})
    room = resolve_max_tokens(prompt, sampling, info)
    if max_name in given:
        max_tokens = room  # what was given, or all there is
    else:
        default = _default_length(info, "max", num_prompt_tokens, applied)
        if default is not None and default < 1:
            raise InvalidRequestError(
                f"the decoder prompt has {num_prompt_tokens} tokens, the model's default max_length is "
                f"{info.generation_defaults.max_length}: set max_tokens",
                param="decoder_prompt",
                code="context_length_exceeded",
            )
        default = fallback_max_tokens if default is None else default
        max_tokens = room if default is None else min(room, default)
    if given_min is None:
        default_min = _default_length(info, "min", num_prompt_tokens, applied) or 0
        given_min = min(max(0, default_min), max_tokens)
    elif given_min > max_tokens:
        raise InvalidRequestError(
            f"{min_name} is {given[min_name]}, but the model's default output limit is {max_tokens} tokens: "
            "set max_tokens, too",
            param=min_name,
        )
    return replace(sampling, max_tokens=max_tokens, min_tokens=given_min)


def _given_length(given: Mapping[str, Any], side: str, num_prompt_tokens: int) -> tuple[int | None, str]:
    """Tokens that the request wants at least or at most, None if it does not say, and the name it used."""
    tokens, length = f"{side}_tokens", f"{side}_length"
    if given.get(length) is None:
        return given.get(tokens), tokens
    if given.get(tokens) is not None:
        raise InvalidRequestError(f"give {tokens} or {length}, not both", param=length, code="conflicting_parameters")
    check_int(length, given[length], 0, _MAX_LENGTH)
    num_tokens = given[length] - num_prompt_tokens
    if side == "min":
        return max(0, num_tokens), length
    if num_tokens < 1:
        raise InvalidRequestError(
            f"max_length ({given[length]}) leaves no room behind a decoder prompt of {num_prompt_tokens} tokens",
            param=length,
        )
    return num_tokens, length


def _default_length(info: ModelInfo, side: str, num_prompt_tokens: int, applied: dict[str, Any]) -> int | None:
    """`max_new_tokens` or `min_new_tokens` of the checkpoint; `max_length` and `min_length` come after them."""
    names = (f"{side}_new_tokens", f"{side}_length") if info.is_encoder_decoder else (f"{side}_new_tokens",)
    for name in names:
        value: int | None = getattr(info.generation_defaults, name)
        if value is not None:
            applied[name] = value
            return value if name.endswith("new_tokens") else value - num_prompt_tokens
    return None
