"""Parameters of a request: sampling, beams, structured outputs."""

from __future__ import annotations

from typing import Any

from trivium.errors import InvalidRequestError
from trivium.params import BeamSettings, SamplingParams
from trivium.structured_outputs import StructuredOutputsParams
from trivium.v1 import types_pb2

EARLY_STOPPING_TO_PROTO: dict[bool | str, types_pb2.EarlyStopping] = {
    False: types_pb2.EARLY_STOPPING_FALSE,
    True: types_pb2.EARLY_STOPPING_TRUE,
    "never": types_pb2.EARLY_STOPPING_NEVER,
}

EARLY_STOPPING_FROM_PROTO = {value: key for key, value in EARLY_STOPPING_TO_PROTO.items()}

_SAMPLING_SCALARS = (
    "n",
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "forced_bos_token_id",
    "prompt_lookup_num_tokens",
    "logprobs",
    "prompt_logprobs",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "top_a",
    "epsilon_cutoff",
    "eta_cutoff",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_range",
    "xtc_threshold",
    "xtc_probability",
    "seed",
    "include_stop_str_in_output",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "detokenize",
    "skip_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
)

_SAMPLING_IDS = ("stop_token_ids", "dry_sequence_breaker_ids", "suppress_tokens", "begin_suppress_tokens")

_BEAM_SCALARS = ("length_penalty", "num_groups", "diversity_penalty")


def sampling_params_to_proto(params: SamplingParams) -> types_pb2.SamplingParams:
    scalars = {name: getattr(params, name) for name in _SAMPLING_SCALARS}
    return types_pb2.SamplingParams(
        **{name: value for name, value in scalars.items() if value is not None},
        **{name: getattr(params, name) for name in _SAMPLING_IDS},
        stop=params.stop,
        allowed_token_ids=params.allowed_token_ids,
        bad_words=params.bad_words,
        bad_words_token_ids=[types_pb2.TokenSequence(ids=ids) for ids in params.bad_words_token_ids],
        logit_bias=[types_pb2.LogitBias(token_id=token_id, bias=bias) for token_id, bias in params.logit_bias.items()],
        unlimited_tokens=params.max_tokens is None,
        beam=None if params.beam is None else _beam_to_proto(params.beam),
        structured_outputs=None
        if params.structured_outputs is None
        else structured_outputs_to_proto(params.structured_outputs),
    )


def sampling_params_from_proto(message: types_pb2.SamplingParams) -> SamplingParams:
    """Unset scalars take the defaults of SamplingParams. Raises InvalidRequestError."""
    return SamplingParams(**sampling_fields_from_proto(message))


def sampling_fields_from_proto(message: types_pb2.SamplingParams) -> dict[str, Any]:
    """What `message` says, by the names of SamplingParams; what it leaves unset is absent.

    Raises InvalidRequestError.
    """
    fields: dict[str, Any] = {name: getattr(message, name) for name in _SAMPLING_SCALARS if message.HasField(name)}
    if message.unlimited_tokens:
        if "max_tokens" in fields:
            raise InvalidRequestError("max_tokens is set together with unlimited_tokens", param="max_tokens")
        fields["max_tokens"] = None
    if len({item.token_id for item in message.logit_bias}) < len(message.logit_bias):
        raise InvalidRequestError("logit_bias names a token twice", param="logit_bias", code="invalid_logit_bias")
    lists: dict[str, Any] = {name: tuple(getattr(message, name)) for name in _SAMPLING_IDS}
    lists |= {
        "stop": tuple(message.stop),
        "allowed_token_ids": tuple(message.allowed_token_ids),
        "bad_words": tuple(message.bad_words),
        "bad_words_token_ids": tuple(tuple(sequence.ids) for sequence in message.bad_words_token_ids),
        "logit_bias": {item.token_id: item.bias for item in message.logit_bias},
    }
    if message.HasField("beam"):
        fields["beam"] = _beam_from_proto(message.beam)
    if message.HasField("structured_outputs"):
        fields["structured_outputs"] = structured_outputs_from_proto(message.structured_outputs)
    return fields | {name: value for name, value in lists.items() if value}


def structured_outputs_to_proto(params: StructuredOutputsParams) -> types_pb2.StructuredOutputs:
    value: Any = getattr(params, params.kind)
    if params.kind == "choice":
        value = types_pb2.StructuredChoice(values=value)
    return types_pb2.StructuredOutputs(
        **{params.kind: value},
        disable_any_whitespace=params.disable_any_whitespace,
        whitespace_pattern=params.whitespace_pattern,
    )


def structured_outputs_from_proto(message: types_pb2.StructuredOutputs) -> StructuredOutputsParams:
    """Raises InvalidRequestError."""
    kind = message.WhichOneof("kind")
    fields: dict[str, Any] = {} if kind is None else {kind: getattr(message, kind)}
    if kind == "choice":
        fields[kind] = tuple(message.choice.values)
    if message.HasField("whitespace_pattern"):
        fields["whitespace_pattern"] = message.whitespace_pattern
    return StructuredOutputsParams(**fields, disable_any_whitespace=message.disable_any_whitespace)


def _beam_to_proto(beam: BeamSettings) -> types_pb2.BeamSettings:
    return types_pb2.BeamSettings(
        width=beam.width,
        early_stopping=EARLY_STOPPING_TO_PROTO[beam.early_stopping],
        **{name: getattr(beam, name) for name in _BEAM_SCALARS},
    )


def _beam_from_proto(message: types_pb2.BeamSettings) -> BeamSettings:
    fields: dict[str, Any] = {name: getattr(message, name) for name in _BEAM_SCALARS if message.HasField(name)}
    if message.early_stopping not in EARLY_STOPPING_FROM_PROTO:
        raise InvalidRequestError("early_stopping is unknown", param="early_stopping")
    early_stopping = EARLY_STOPPING_FROM_PROTO[message.early_stopping]
    return BeamSettings(width=message.width, early_stopping=early_stopping, **fields)
