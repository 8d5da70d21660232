"""From the fields of a request to `SamplingParams`, and the checks that completions and chat share.

Nothing is dropped in silence: a field that this server does not implement is refused as soon as it has an effect.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from trivium.config import ModelInfo
from trivium.engine import EngineClient
from trivium.errors import InvalidRequestError, rename_params
from trivium.generation_defaults import ResolvedSampling
from trivium.inputs import EncodedPrompt
from trivium.params import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams, check_int
from trivium.prompt_truncation import Truncation
from trivium.sampling_tokens import check_sampling_tokens, complete_sampling
from trivium_gateway.beams import given_beams, wants_beams, width_field
from trivium_gateway.errors import unsupported_parameter
from trivium_gateway.logprobs import LogprobsForm
from trivium_gateway.openai_protocol import ALIASES, FinishName, GenerationFields, first_used
from trivium_gateway.structured import client_names, given_structured_outputs

MAX_USER_CHARS = 512
MAX_METADATA = 16
MAX_SALT_CHARS = 256
MAX_METADATA_CHARS = 512

_TEMPLATE_ARGUMENTS = frozenset({"chat_template", "tokenize", "tokenizer", "return_tensors", "return_dict", "template"})
REQUEST_ID = re.compile(r"[ -~]{1,128}")
_TOKEN_ID = re.compile("[0-9]{1,10}")
_LENGTH_FIELDS = ("max_length", "min_length")  # of `resolve_sampling`, where a request has them
_SAMPLING_FIELDS = tuple(
    {field.name for field in dataclasses.fields(SamplingParams)} & set(GenerationFields.__struct_fields__)
)

RequestT = TypeVar("RequestT", bound=GenerationFields)


def resolve_aliases(request: RequestT) -> RequestT:
    """`request` with the values of ALIASES under our names, too. Raises InvalidRequestError where the two differ."""
    values = {}
    for alias, name in ALIASES.items():
        value = getattr(request, alias)
        if value is None:
            continue
        if getattr(request, name) not in (None, value):
            raise InvalidRequestError(
                f"{name} and {alias} differ; give one of them", param=alias, code="conflicting_parameters"
            )
        values[name] = value
    return msgspec.structs.replace(request, **values) if values else request


def as_given(error: InvalidRequestError, request: GenerationFields) -> InvalidRequestError:
    """`error` with the names of the fields that the client used, where there are several."""
    names = {name: alias for alias, name in ALIASES.items() if getattr(request, alias) is not None}
    if request.beam_width is None and wants_beams(request):
        field = width_field(request)
        names["beam_width"] = names["num_beams"] = names.get(field, field)
    return rename_params(error, names | client_names(request))


def check_fields(fields: dict[str, Any], request: GenerationFields, unsupported: dict[str, tuple[object, ...]]) -> None:
    """Raise InvalidRequestError for a field that is not supported, too long, or set without the one it belongs to."""
    check_template_fields(fields)
    for name in first_used(fields, unsupported):
        raise unsupported_parameter(name)
    is_best_of = request.best_of is not None and request.best_of > (request.n or 1) and not wants_beams(request)
    if request.stream and is_best_of:
        raise InvalidRequestError("best_of above n cannot be streamed: the best are known at the end", param="best_of")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    if request.debug and request.stream:
        raise InvalidRequestError("debug cannot be streamed: it adds to the response", param="debug")
    if request.stream_options is not None:
        if not request.stream:
            raise InvalidRequestError("stream_options needs stream=true", param="stream_options")
        if request.stream_options.continuous_usage_stats and not request.stream_options.include_usage:
            raise InvalidRequestError(
                "stream_options.continuous_usage_stats needs include_usage=true",
                param="stream_options.continuous_usage_stats",
            )
    if request.priority is not None:
        check_int("priority", request.priority, -(2**31), 2**31 - 1)
    if request.cache_salt is not None and not 1 <= len(request.cache_salt) <= MAX_SALT_CHARS:
        raise InvalidRequestError(f"cache_salt must have 1 to {MAX_SALT_CHARS} characters", param="cache_salt")
    if request.request_id is not None and not REQUEST_ID.fullmatch(request.request_id):
        raise InvalidRequestError(
            "request_id must be 1 to 128 printable ASCII characters", param="request_id", code="invalid_request_id"
        )
    if request.user is not None and len(request.user) > MAX_USER_CHARS:
        raise _too_long("user", f"{MAX_USER_CHARS} characters")
    metadata = request.metadata or {}
    if len(metadata) > MAX_METADATA or any(len(key) + len(metadata[key]) > MAX_METADATA_CHARS for key in metadata):
        raise _too_long("metadata", f"{MAX_METADATA} pairs of {MAX_METADATA_CHARS} characters")


def check_template_fields(fields: dict[str, Any]) -> None:
    """Templates are programs: they come with the model, never from a client, in whatever field."""
    arguments = fields.get("chat_template_kwargs")
    if fields.get("chat_template") is not None:
        param = "chat_template"
    elif isinstance(arguments, dict) and not _TEMPLATE_ARGUMENTS.isdisjoint(arguments):
        param = "chat_template_kwargs"
    else:
        return
    raise InvalidRequestError(f"{param} must not change the template", param=param, code="template_not_allowed")


def _too_long(param: str, limit: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} must not be longer than {limit}", param=param, code="too_long")


def given_sampling(
    request: GenerationFields, *, max_tokens: int | None, info: ModelInfo, logprobs: LogprobsForm
) -> dict[str, Any]:
    """What `request` says, by the names that `resolve_sampling` takes. Raises InvalidRequestError for wrong values."""
    names = (*_SAMPLING_FIELDS, *(name for name in _LENGTH_FIELDS if hasattr(request, name)))
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    for name in ("max_tokens", "structured_outputs"):
        given.pop(name, None)
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    if request.logit_bias is not None:
        given["logit_bias"] = _logit_bias(request.logit_bias)
    structured_outputs = given_structured_outputs(request)
    if structured_outputs is not None:
        given["structured_outputs"] = structured_outputs
    given |= {"logprobs": logprobs.num_top, "prompt_logprobs": logprobs.num_engine_prompt_top}
    if wants_beams(request):
        given.pop("best_of", None)
    # Checked before any text is tokenized; an output limit that only the checkpoint knows is not known yet.
    checked = {name: value for name, value in given.items() if name in _SAMPLING_FIELDS}
    unset = {"max_tokens": None} | ({"temperature": 0.0} if info.is_encoder_decoder else {})
    check_sampling_tokens(SamplingParams(**unset | checked), info)
    return given | given_beams(request)


def truncation_of(given: Mapping[str, Any], fallback_max_tokens: int | None) -> Truncation | None:
    """How to cut the prompts of a request that says `given`, None for not at all."""
    if "truncate_prompt_tokens" not in given:
        return None
    num_reserved = given.get("max_tokens") or fallback_max_tokens or 1
    return Truncation(given["truncate_prompt_tokens"], given.get("truncation_side"), num_reserved)


def check_num_logprobs(name: str, count: int | None) -> None:
    """Raise InvalidRequestError naming the field if `count` is set and out of range."""
    if count is not None:
        check_int(name, count, 0, MAX_LOGPROBS)


def _logit_bias(bias: object) -> object:
    """`bias` with the token ids as numbers: keys of JSON objects are strings. SamplingParams checks the rest."""
    if not isinstance(bias, dict) or len(bias) > MAX_LOGIT_BIAS:
        return bias
    by_id = {int(key) if _TOKEN_ID.fullmatch(key) else key: value for key, value in bias.items()}
    if len(by_id) < len(bias):
        raise InvalidRequestError("logit_bias names a token twice", param="logit_bias", code="invalid_logit_bias")
    return by_id


async def fit_sampling(
    given: Mapping[str, Any],
    prompt: EncodedPrompt,
    info: ModelInfo,
    engine: EngineClient,
    *,
    fallback_max_tokens: int | None,
) -> ResolvedSampling:
    """`given` completed for `prompt`, with a seed. Raises ContextLengthError and InvalidRequestError."""
    resolved = await complete_sampling(given, prompt, info, engine, fallback_max_tokens=fallback_max_tokens)
    if resolved.sampling.seed is not None:
        return resolved
    return dataclasses.replace(resolved, sampling=dataclasses.replace(resolved.sampling, seed=secrets.randbits(63)))


def shown_finish(reason: str | None) -> FinishName:
    """The finish reason of a complete choice, as clients know it."""
    if reason == "length":
        return "length"
    assert reason == "stop", f"a complete choice cannot end by {reason}"
    return "stop"
