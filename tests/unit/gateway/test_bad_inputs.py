"""What is refused, with exactly which status, code and param. The rows are those of the reliability test plan."""

from __future__ import annotations

import json
import logging
from enum import Enum
from typing import Any

import pytest

from trivium.errors import EngineUnavailableError, InternalError, InvalidRequestError, OverloadedError
from unit.gateway.fakes import MAX_ENCODER_LEN, MAX_MODEL_LEN, VOCAB_SIZE, World, post, request

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

Error = tuple[int, str, str | None]

INVALID_JSON: Error = (400, "invalid_json", None)
INVALID_ENCODING: Error = (400, "invalid_encoding", None)

BODIES: list[tuple[str, bytes, Error]] = [
    ("B1 empty", b"", INVALID_JSON),
    ("B2 truncated", b"{", INVALID_JSON),
    ("B2 trailing", b'{"model":"tiny","prompt":"a"} x', INVALID_JSON),
    ("B2 raw control character", b'{"model":"tiny","prompt":"\0"}', INVALID_JSON),
    ("B3 array", b"[]", (400, "invalid_type", None)),
    ("B3 string", b'"a"', (400, "invalid_type", None)),
    ("B3 number", b"1", (400, "invalid_type", None)),
    ("B3 null", b"null", (400, "invalid_type", None)),
    ("B4 NaN", b'{"model":"tiny","prompt":"a","temperature":NaN}', INVALID_JSON),
    ("B4 Infinity", b'{"model":"tiny","prompt":"a","temperature":Infinity}', INVALID_JSON),
    ("B4 -Infinity", b'{"model":"tiny","prompt":"a","temperature":-Infinity}', INVALID_JSON),
    ("B5 10,000 digits", b'{"model":"tiny","prompt":"a","seed":' + b"1" * 10_000 + b"}", INVALID_JSON),
    ("B6 100,000 deep", b"[" * 100_000, (400, "json_too_deep", None)),
    ("B6 100,000 deep objects", b'{"a":' * 100_000, (400, "json_too_deep", None)),
    ("B6 65 deep", b'{"model":"tiny","prompt":"a","x":' + b"[" * 64 + b"]" * 64 + b"}", (400, "json_too_deep", None)),
    ("B8 UTF-16 with BOM", '{"model":"tiny","prompt":"a"}'.encode("utf-16"), INVALID_ENCODING),
    ("B8 UTF-16 without BOM", '{"model":"tiny","prompt":"a"}'.encode("utf-16-le"), INVALID_ENCODING),
    ("B8 GBK", '{"model":"tiny","prompt":"中文"}'.encode("gbk"), INVALID_ENCODING),
    ("B8 latin-1", '{"model":"tiny","prompt":"é"}'.encode("latin-1"), INVALID_ENCODING),
    ("B9 half a pair", b'{"model":"tiny","prompt":"\\ud800"}', (400, "invalid_unicode", "prompt")),
    ("B9 wrong order", b'{"model":"tiny","prompt":"\\udc00\\ud800 and more"}', (400, "invalid_unicode", "prompt")),
    ("B9 list", b'{"model":"tiny","prompt":["a","\\udfff"]}', (400, "invalid_unicode", "prompt")),
    ("B9 raw", b'{"model":"tiny","prompt":"\xed\xa0\x80"}', INVALID_ENCODING),
    ("pairs in broken JSON", b'{"model":"tiny","prompt":"\\ud83d\\ude00"', INVALID_JSON),
]


@pytest.mark.parametrize(("body", "error"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_bad_body(world: World, path: str, body: bytes, error: Error) -> None:
    assert post(world.port, path, body).error == error


def bad(code: str, param: str | None, status: int = 400) -> Error:
    return status, code, param


def unsupported(**fields: Any) -> list[tuple[dict[str, Any], Error]]:
    return [({name: value}, bad("unsupported_parameter", name)) for name, value in fields.items()]


class Missing(Enum):
    """Stands for a field that is left out."""

    FIELD = "missing"


MISSING = Missing.FIELD
INVALID_PROMPTS: list[tuple[dict[str, Any], Error]] = [
    ({"prompt": MISSING}, bad("missing_prompt", "prompt")),
    ({"prompt": None}, bad("missing_prompt", "prompt")),
    ({"prompt": ""}, bad("empty_prompt", "prompt")),
    ({"prompt": []}, bad("invalid_prompt", "prompt")),
    ({"prompt": [[]]}, bad("invalid_prompt", "prompt[0]")),
    ({"prompt": [""]}, bad("invalid_prompt", "prompt[0]")),
    ({"prompt": [None]}, bad("invalid_prompt", "prompt[0]")),
    ({"prompt": ["a", [1]]}, bad("invalid_prompt", "prompt[1]")),
    ({"prompt": [[1], "a"]}, bad("invalid_prompt", "prompt[1]")),
    ({"prompt": {"prompt": "a"}}, bad("invalid_prompt", "prompt")),
    ({"prompt": 5}, bad("invalid_prompt", "prompt")),
    *(
        ({"prompt": [[1], [2, token_id]]}, bad("invalid_token_id", "prompt[1][1]"))
        for token_id in (-1, VOCAB_SIZE, 2**31, 2**64, 1.5, True, "3", None)
    ),
    ({"prompt": [1, VOCAB_SIZE]}, bad("invalid_token_id", "prompt[1]")),
    ({"prompt": [1, -1]}, bad("invalid_token_id", "prompt[1]")),
    ({"prompt": [True]}, bad("invalid_token_id", "prompt[0]")),
    ({"prompt": "a" * (MAX_MODEL_LEN + 1)}, bad("context_length_exceeded", "prompt")),
    ({"prompt": [1] * (MAX_MODEL_LEN + 1)}, bad("context_length_exceeded", "prompt")),
    ({"prompt": ["a", "b" * 2000]}, bad("context_length_exceeded", "prompt[1]")),
    ({"prompt": "a" * 990, "max_tokens": 11}, bad("context_length_exceeded", "max_tokens")),
    ({"prompt": ["a"] * 65}, bad("too_many_prompts", "prompt")),
    ({"prompt_embeds": "AAAA"}, bad("feature_disabled", "prompt_embeds")),
    ({"encoder_prompt": "a"}, bad("conflicting_parameters", "encoder_prompt")),
    ({"source_language": "fr"}, bad("not_encoder_decoder", "source_language")),
    ({"target_language": "fr"}, bad("not_encoder_decoder", "target_language")),
    ({"prompt": MISSING, "encoder_prompt": "a"}, bad("not_encoder_decoder", "encoder_prompt")),
    ({"decoder_prompt": "a"}, bad("not_encoder_decoder", "encoder_prompt")),
    ({"prompt": MISSING, "encoder_prompt": "a", "decoder_prompt": "b"}, bad("not_encoder_decoder", "encoder_prompt")),
]
INVALID_SAMPLING: list[tuple[dict[str, Any], Error]] = [
    ({"model": MISSING}, bad("missing_model", "model")),
    ({"model": None}, bad("missing_model", "model")),
    ({"model": 5}, bad("invalid_type", "model")),
    ({"model": "x" * 2**20}, bad("model_not_found", "model", 404)),
    ({"model": "../../etc/passwd"}, bad("model_not_found", "model", 404)),
    ({"model": "unloaded"}, bad("engine_unavailable", None, 503)),
    *(({"max_tokens": value}, bad("invalid_value", "max_tokens")) for value in (-1, 0, 2**31)),
    *(({"max_tokens": value}, bad("invalid_type", "max_tokens")) for value in (1.5, "5", True)),
    ({"max_tokens": 10**9}, bad("context_length_exceeded", "max_tokens")),
    *(({"n": value}, bad("invalid_value", "n")) for value in (0, -1, 17, 10**9)),
    ({"n": 3, "best_of": 2}, bad("invalid_value", "best_of")),
    ({"best_of": 17}, bad("invalid_value", "best_of")),
    ({"best_of": 2, "stream": True, "temperature": 0}, bad("invalid_value", "best_of")),
    ({"best_of": 2, "stream": True}, bad("invalid_value", "best_of")),
    *(({"prompt_logprobs": value}, bad("invalid_value", "prompt_logprobs")) for value in (-1, 21)),
    *(({"prompt_logprobs": value}, bad("invalid_type", "prompt_logprobs")) for value in ("x", True, 1.5)),
    ({"prompt_logprobs": 1, "stream": True}, bad("invalid_value", "prompt_logprobs")),
    *(({"temperature": value}, bad("invalid_value", "temperature")) for value in (-0.1, 2.1, 1e308)),
    *(({"temperature": value}, bad("invalid_type", "temperature")) for value in ("hot", "NaN", True)),
    *(({"top_p": value}, bad("invalid_value", "top_p")) for value in (0, 1.1, -1)),
    *(({"top_k": value}, bad("invalid_value", "top_k")) for value in (-2, 10**12)),
    ({"top_k": 0.5}, bad("invalid_type", "top_k")),
    ({"min_p": 2}, bad("invalid_value", "min_p")),
    *(({"seed": value}, bad("invalid_value", "seed")) for value in (2**63, -(2**63) - 1)),
    *(({"seed": value}, bad("invalid_type", "seed")) for value in (1.2, "x")),
    *(({"stop": value}, bad("invalid_stop", "stop")) for value in (["x"] * 17, "", [""], "x" * 300, 5, [["x"]], [5])),
    ({"stop_token_ids": [VOCAB_SIZE]}, bad("invalid_token_id", "stop_token_ids[0]")),
    ({"stop_token_ids": [-1]}, bad("invalid_value", "stop_token_ids")),
    ({"stop_token_ids": ["a"]}, bad("invalid_type", "stop_token_ids")),
    ({"min_tokens": 6, "max_tokens": 5}, bad("invalid_value", "min_tokens")),
    ({"min_tokens": 5000}, bad("invalid_value", "min_tokens")),
    ({"min_tokens": -1}, bad("invalid_value", "min_tokens")),
    ({"stream_options": {"include_usage": True}}, bad("invalid_value", "stream_options")),
    ({"stream": "yes"}, bad("invalid_type", "stream")),
    ({"ignore_eos": 1}, bad("invalid_type", "ignore_eos")),
    ({"chat_template": "{{ 1 }}"}, bad("template_not_allowed", "chat_template")),
    ({"chat_template_kwargs": {"tokenize": True}}, bad("template_not_allowed", "chat_template_kwargs")),
    ({"user": "u" * 10_000}, bad("too_long", "user")),
    ({"metadata": {"k": "v" * 10_000}}, bad("too_long", "metadata")),
    ({"metadata": {str(key): "" for key in range(1000)}}, bad("too_long", "metadata")),
    *unsupported(
        dry_sequence_breakers=["x"],
        mirostat_mode=2,
        tfs=0.5,
    ),
]


def body_for(base: dict[str, Any], fields: dict[str, Any]) -> bytes:
    merged = {name: value for name, value in (base | fields).items() if value is not MISSING}
    return json.dumps(merged).encode()


def ids(rows: list[tuple[dict[str, Any], Error]]) -> list[str]:
    return [f"{fields!s:.50}" for fields, _ in rows]


COMPLETION_ROWS = [
    *INVALID_PROMPTS,
    *INVALID_SAMPLING,
    *(({"logprobs": value}, bad("invalid_value", "logprobs")) for value in (-1, 21)),
    *(({"logprobs": value}, bad("invalid_type", "logprobs")) for value in ("x", True, 0.5)),
    ({"echo": "yes"}, bad("invalid_type", "echo")),
    *unsupported(top_logprobs=1, suffix="x", add_special_tokens=False),
]


@pytest.mark.parametrize(("fields", "error"), COMPLETION_ROWS, ids=ids(COMPLETION_ROWS))
def test_bad_completion(world: World, fields: dict[str, Any], error: Error) -> None:
    answer = post(world.port, COMPLETIONS, body_for({"model": "tiny", "prompt": "a"}, fields))
    assert answer.error == error
    assert ("retry-after" in answer.headers) == (answer.status == 503)


ENCODER_DECODER_ROWS: list[tuple[dict[str, Any], Error]] = [
    ({"decoder_prompt": "a"}, bad("missing_prompt", "encoder_prompt")),
    ({"encoder_prompt": {"encoder_prompt": "a"}, "decoder_prompt": "b"}, bad("invalid_prompt", "encoder_prompt")),
    ({"encoder_prompt": ["a", 5], "decoder_prompt": "b"}, bad("invalid_prompt", "encoder_prompt[1]")),
    ({"encoder_prompt": []}, bad("invalid_prompt", "encoder_prompt")),
    ({"encoder_prompt": ["a"] * 65}, bad("too_many_prompts", "encoder_prompt")),
    ({"encoder_prompt": ["a", "b"], "decoder_prompt": ["c"]}, bad("invalid_prompt", "decoder_prompt")),
    ({"encoder_prompt": "a", "decoder_prompt": ["c", "d"]}, bad("invalid_prompt", "decoder_prompt")),
    ({"prompt": ["a", "b"], "decoder_prompt": [[1], [2], [3]]}, bad("invalid_prompt", "decoder_prompt")),
    ({"encoder_prompt": ["a", "b"], "decoder_prompt": [[1], [999]]}, bad("invalid_token_id", "decoder_prompt[0]")),
    ({"prompt": "a", "encoder_prompt": "b"}, bad("conflicting_parameters", "encoder_prompt")),
    ({"prompt": "a", "target_language": "tlh"}, bad("unknown_language", "target_language")),
    ({"prompt": "a", "source_language": "tlh"}, bad("unknown_language", "source_language")),
    ({"prompt": [1], "source_language": "fr"}, bad("invalid_value", "source_language")),
    ({"prompt": "a", "target_language": 5}, bad("invalid_type", "target_language")),
    ({"prompt": "a", "debug": True, "stream": True}, bad("invalid_value", "debug")),
    ({"encoder_prompt": [1, 999], "decoder_prompt": "b"}, bad("invalid_token_id", "encoder_prompt[1]")),
    ({"prompt": ["a", "b"], "decoder_prompt": [999]}, bad("invalid_token_id", "decoder_prompt[0]")),
    ({"prompt": [[1], [999]], "decoder_prompt": "b"}, bad("invalid_token_id", "prompt[1][0]")),
    ({"prompt": "a" * (MAX_ENCODER_LEN + 1)}, bad("context_length_exceeded", "encoder_prompt")),
    ({"prompt": [1] * (MAX_ENCODER_LEN + 1)}, bad("context_length_exceeded", "encoder_prompt")),
    ({"prompt": "a", "decoder_prompt": "b" * MAX_MODEL_LEN}, bad("context_length_exceeded", "decoder_prompt")),
    ({"prompt": "a", "decoder_prompt": [1] * 5000}, bad("context_length_exceeded", "decoder_prompt")),
]


@pytest.mark.parametrize(("fields", "error"), ENCODER_DECODER_ROWS, ids=ids(ENCODER_DECODER_ROWS))
def test_bad_encoder_decoder_completion(world: World, fields: dict[str, Any], error: Error) -> None:
    assert post(world.port, COMPLETIONS, {"model": "org/translator"} | fields).error == error


USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ok"}


def part(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "a"}, fields]}


MESSAGES: list[tuple[Any, Error]] = [
    (MISSING, bad("invalid_messages", "messages")),
    ([], bad("invalid_messages", "messages")),
    ("hi", bad("invalid_messages", "messages")),
    ([USER, "hi"], bad("invalid_messages", "messages[1]")),
    ([{"role": "robot", "content": "a"}], bad("invalid_messages", "messages[0].role")),
    ([{"content": "a"}], bad("invalid_messages", "messages[0].role")),
    ([{"role": ["user"], "content": "a"}], bad("invalid_messages", "messages[0].role")),
    ([{"role": "user", "content": None}], bad("invalid_messages", "messages[0].content")),
    ([{"role": "user"}], bad("invalid_messages", "messages[0].content")),
    ([{"role": "user", "content": {"text": "a"}}], bad("invalid_messages", "messages[0].content")),
    ([{"role": "user", "content": ["a"]}], bad("invalid_messages", "messages[0].content[0]")),
    ([{"role": "user", "content": "a", "name": 5}], bad("invalid_messages", "messages[0].name")),
    ([part(type="text")], bad("invalid_messages", "messages[0].content[1].text")),
    ([USER] * 5000, bad("invalid_messages", "messages")),
    ([USER, {"role": "tool", "content": "a"}], bad("invalid_messages", "messages[1].tool_call_id")),
    ([USER, ASSISTANT | {"tool_calls": [{}]}], bad("invalid_messages", "messages[1].tool_calls[0]")),
    *(
        ([part(type=kind, **{kind: {"url": url}})], bad("unsupported_content", "messages[0].content[1]"))
        for kind in ("image_url", "input_audio")
        for url in ("file:///etc/passwd", "http://169.254.169.254/")
    ),
    ([{"role": "user", "content": "refused by template"}], bad("template_error", "messages")),
    ([{"role": "user", "content": ""}], bad("empty_prompt", "messages")),
    ([{"role": "user", "content": "a" * MAX_MODEL_LEN}], bad("context_length_exceeded", "messages")),
]
CHAT_ROWS: list[tuple[dict[str, Any], Error]] = [
    *(({"messages": messages}, error) for messages, error in MESSAGES),
    *INVALID_SAMPLING,
    *(({"logprobs": True, "top_logprobs": value}, bad("invalid_value", "top_logprobs")) for value in (-1, 21)),
    *(({"logprobs": True, "top_logprobs": value}, bad("invalid_type", "top_logprobs")) for value in ("x", True)),
    *(({"logprobs": value}, bad("invalid_type", "logprobs")) for value in (-1, 21, 1, "x")),
    *(({"logprobs": value, "top_logprobs": 2}, bad("invalid_value", "top_logprobs")) for value in (MISSING, False)),
    ({"max_completion_tokens": 0}, bad("invalid_value", "max_completion_tokens")),
    ({"max_completion_tokens": 5000}, bad("context_length_exceeded", "max_completion_tokens")),
    ({"max_completion_tokens": 5, "max_tokens": 6}, bad("conflicting_parameters", "max_completion_tokens")),
    (
        {"messages": [USER, ASSISTANT], "add_generation_prompt": True},
        bad("invalid_messages", "messages[1].role"),
    ),
    ({"continue_final_message": True}, bad("invalid_messages", "messages[0].role")),
    (
        {"messages": [USER, ASSISTANT], "add_generation_prompt": True, "continue_final_message": True},
        bad("conflicting_parameters", "continue_final_message"),
    ),
    *unsupported(
        echo=True,
        functions=[{}],
        modalities=["audio"],
        reasoning_effort="high",
        documents=[{}],
    ),
]


@pytest.mark.parametrize(("fields", "error"), CHAT_ROWS, ids=ids(CHAT_ROWS))
def test_bad_chat(world: World, fields: dict[str, Any], error: Error) -> None:
    assert post(world.port, CHAT, body_for({"model": "tiny", "messages": [USER]}, fields)).error == error


def test_encoder_decoder_chat_needs_a_user_message(world: World) -> None:
    body = {"model": "org/translator", "messages": [{"role": "system", "content": "a"}]}
    assert post(world.port, CHAT, body).error == bad("invalid_messages", "messages")


NEUTRAL: list[dict[str, Any]] = [
    {"logprobs": None, "best_of": 1, "suffix": "", "echo": False, "presence_penalty": 0, "frequency_penalty": 0.0},
    {"logit_bias": {}, "response_format": {"type": "text"}, "repetition_penalty": 1.0, "prompt_embeds": None},
    {"temperature": None, "max_tokens": None, "stop": None, "seed": None, "n": None, "stream": None},
    {"temperature": 1e-9},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"top_k": -1},
    {"stop": ["x" * 256] * 16},
    {"n": 2, "best_of": 2},
    {"n": 2, "best_of": 2, "stream": True},
    {"bad_words": [], "dry_sequence_breaker_ids": [], "no_repeat_ngram_size": 0, "min_p": 0},
    {"an_unknown_field": {"a": [1, 2]}},
    {"metadata": {"job": "7"}, "user": "me"},
    {"x": "[{" * 100},  # brackets in text are no depth
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda fields: f"{fields!s:.50}")
def test_values_without_effect_are_taken(world: World, fields: dict[str, Any]) -> None:
    assert post(world.port, COMPLETIONS, {"model": "tiny", "prompt": "a"} | fields).status == 200


def test_chat_values_without_effect_are_taken(world: World) -> None:
    fields = {"tools": [], "tool_choice": "auto", "logprobs": False, "parallel_tool_calls": True, "store": False}
    assert post(world.port, CHAT, {"model": "tiny", "messages": [USER]} | fields).status == 200


def test_byte_order_mark_is_stripped(world: World) -> None:
    assert post(world.port, COMPLETIONS, b'\xef\xbb\xbf{"model":"tiny","prompt":"a"}').status == 200


def test_last_of_duplicate_keys_counts(world: World) -> None:
    assert post(world.port, COMPLETIONS, b'{"model":"other","prompt":"a","model":"tiny"}').status == 200


def test_64_levels_are_taken(world: World) -> None:
    body = b'{"model":"tiny","prompt":"a","x":' + b"[" * 63 + b"]" * 63 + b"}"
    assert post(world.port, COMPLETIONS, body).status == 200


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({"Content-Type": "text/plain"}, bad("unsupported_media_type", None, 415)),
        ({"Content-Type": "application/x-www-form-urlencoded"}, bad("unsupported_media_type", None, 415)),
        ({"Content-Type": "application/json; charset=utf-16"}, INVALID_ENCODING),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, bad("unsupported_encoding", None, 415)),
        ({"Content-Type": "application/json", "Content-Encoding": "br"}, bad("unsupported_encoding", None, 415)),
    ],
)
def test_bad_media_type(world: World, headers: dict[str, str], error: Error) -> None:
    body = b'{"model":"tiny","prompt":"a"}'
    assert request(world.port, "POST", COMPLETIONS, body, headers).error == error


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "application/json; charset=UTF-8"}, {"Content-Type": "application/vnd.x+json"}]
)
def test_json_media_types_are_taken(world: World, headers: dict[str, str]) -> None:
    assert request(world.port, "POST", COMPLETIONS, b'{"model":"tiny","prompt":"a"}', headers).status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "error", "header"),
    [
        (OverloadedError("the queue is full"), bad("queue_full", None, 429), "retry-after"),
        (EngineUnavailableError("gone"), bad("engine_unavailable", None, 503), "retry-after"),
        (InvalidRequestError("no", code="exceeds_kv_capacity"), bad("exceeds_kv_capacity", None), None),
        (InternalError("device lost"), bad("internal_error", None, 500), "x-should-retry"),
        (RuntimeError("secret at /home/x"), bad("internal_error", None, 500), "x-should-retry"),
    ],
)
def test_engine_failure_before_the_first_byte_is_a_status(
    world: World, failure: Exception, error: Error, header: str | None, stream: bool
) -> None:
    world.tiny.scripts["fails"] = [failure]
    answer = post(world.port, COMPLETIONS, {"model": "tiny", "prompt": "fails", "stream": stream})
    assert answer.error == error
    assert b"secret" not in answer.body and b"Traceback" not in answer.body
    assert header is None or answer.headers[header] in ("1", "false")


def test_a_4xx_logs_no_error(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        post(world.port, COMPLETIONS, {"model": "tiny", "odd": 1})
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert "odd" in caplog.text
