"""The OpenAI protocol as types: what clients send and what they get.

Field names, defaults and shapes are OpenAI's; the sampling fields that OpenAI does not have are those of `params.py`. A
field of a request is None where the client left it out. What is typed `Any` has more forms than a type can say and is
checked by `prompts.py`, `chat.py` and `sampling.py`, which name the part that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from trivium_gateway.usage import Usage


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """include_usage: one more chunk at the end, without choices, that counts tokens.

    continuous_usage_stats: every chunk counts those of all choices so far.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True):
    """What all generating endpoints have in common. The sampling fields are checked by `SamplingParams`.

    The names of `ALIASES` mean the same as other fields; `beams.py` reads what follows `use_beam_search`,
    `structured.py` what follows `response_format`.
    source_language and target_language are for multilingual encoder-decoder models. request_id becomes part of the
    response's id. priority: lower first, where the scheduling policy says so. cache_salt: cached prefixes are shared
    only under the same one. user: waiting requests of different users take turns. debug: the response says which
    defaults of the checkpoint were applied.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_new_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_repetition_penalty: float | None = None
    encoder_no_repeat_ngram_size: int | None = None
    logit_bias: Any = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    forced_bos_token_id: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_a: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_range: int | None = None
    dry_sequence_breaker_ids: list[int] | None = None
    xtc_threshold: float | None = None
    xtc_probability: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    min_new_tokens: int | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    use_beam_search: bool | None = None
    num_beams: int | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    num_return_sequences: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    prompt_logprobs: int | None = None
    prompt_lookup_num_tokens: int | None = None
    source_language: str | None = None
    target_language: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    request_id: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    debug: bool | None = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json_object: Any = None
    guided_whitespace_pattern: Any = None


# transformers' name -> the field that it is another name of
ALIASES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "num_return_sequences": "n"}


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """POST /v1/completions. The last two are an extension for encoder-decoder models; a null decoder side is empty.

    logprobs: the number of most likely tokens to report at each position. prompt_embeds: further prompts, ahead of
    `prompt`.
    """

    prompt: Any = None
    prompt_embeds: Any = None
    logprobs: int | None = None
    echo: bool | None = None
    encoder_prompt: Any = None
    decoder_prompt: Any = UNSET


class ChatCompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions. `max_completion_tokens` is the newer name of `max_tokens`.

    prompt_embeds: further prompts, ahead of `messages`, which may then be left out.
    """

    messages: Any = None
    prompt_embeds: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


FinishName = Literal["stop", "length", "tool_calls"]


class PromptLogprob(msgspec.Struct, frozen=True, kw_only=True):
    logprob: float
    rank: int
    decoded_token: str | None


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Columns: entry i is of token i. text_offset counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """`prompt_logprobs`, by token id, and the token ids are vLLM's: there only if they were asked for."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishName
    stop_reason: str | int | None
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    applied_defaults: dict[str, Any] | UnsetType = UNSET


class FunctionCall(msgspec.Struct, kw_only=True):
    """arguments: JSON, as far as the model wrote any. name: absent in all but the first piece of a call."""

    name: str | UnsetType = UNSET
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class DeltaToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a call; id and type are in the first one."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCall


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """content: null where there is nothing but calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatTopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """`bytes` tells what `token` cannot: which part of a character a token is."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishName
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    applied_defaults: dict[str, Any] | UnsetType = UNSET


class TextTaskRequest(GenerationFields, frozen=True, kw_only=True):
    """POST /v1/translations and /v1/summarizations. max_length and min_length count the decoder's start token, too."""

    input: Any = None
    max_length: int | None = None
    min_length: int | None = None


class TextTaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """One output; `input_index` counts the request's inputs."""

    index: int
    input_index: int
    text: str
    finish_reason: FinishName
    stop_reason: str | int | None


class TextTaskResponse(msgspec.Struct, frozen=True, kw_only=True):
    """`object` is "translation" or "summarization"."""

    id: str
    object: str
    created: int
    model: str
    results: list[TextTaskResult]
    usage: Usage
    applied_defaults: dict[str, Any] | UnsetType = UNSET


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """`max_model_len` and `is_encoder_decoder` are absent until the model has been reached once.

    parent: of an adapter, the model that it is for.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "trivium"
    max_model_len: int | UnsetType = UNSET
    is_encoder_decoder: bool | UnsetType = UNSET
    parent: str | UnsetType = UNSET


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


# Fields that OpenAI or vLLM have and this server does not: field -> the values that mean "not used". Any other value
# is refused, since a client that set it expects it to work.
_UNUSED: tuple[object, ...] = (None,)
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "dry_sequence_breakers": (None, []),
    "dynatemp_min": (None, 0),
    "dynatemp_max": (None, 0),
    "temperature_last": (None, False),
    "tfs": (None, 1),
    "smoothing_factor": (None, 0),
    "nsigma": (None, 0),
    "mirostat_mode": (None, 0),
    "return_tokens_as_token_ids": (None, False),
    "spaces_between_special_tokens": (None, True),
    "logits_processors": (None, []),
    "logprob_token_ids": (None, []),
    "thinking_token_budget": (None, -1),
    "repetition_detection": _UNUSED,
    "vllm_xargs": (None, {}),
    "kv_transfer_params": _UNUSED,
    "stream_interval": (None, 1),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
}
UNSUPPORTED_COMPLETION: dict[str, tuple[object, ...]] = _UNSUPPORTED | {
    "top_logprobs": _UNUSED,
    "suffix": (None, ""),
    "add_special_tokens": (None, True),
}
UNSUPPORTED_TEXT_TASK: dict[str, tuple[object, ...]] = _UNSUPPORTED | {
    "echo": (None, False),
    "logprobs": (None, False),
    "prompt_logprobs": _UNUSED,
    "stream": (None, False),
    "return_token_ids": (None, False),
    "add_special_tokens": (None, True),
}
UNSUPPORTED_CHAT: dict[str, tuple[object, ...]] = _UNSUPPORTED | {
    "echo": (None, False),
    "add_special_tokens": (None, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": _UNUSED,
    "prediction": _UNUSED,
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": _UNUSED,
    "documents": (None, []),
    "mm_processor_kwargs": (None, {}),
}


def first_used(fields: dict[str, Any], unused_values: dict[str, tuple[object, ...]]) -> Iterable[str]:
    """Names of the fields that have a value other than those that mean "not used"."""
    return (name for name, unused in unused_values.items() if name in fields and fields[name] not in unused)
