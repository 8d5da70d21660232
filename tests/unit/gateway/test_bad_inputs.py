"""What is refused, with exactly which status, code and param, beside the hostile requests of tests/hostile."""

from __future__ import annotations

import json
import logging
from enum import Enum
from typing import Any

import pytest

from trivium.errors import EngineUnavailableError, InternalError, InvalidRequestError, OverloadedError
from unit.gateway.fakes import MAX_ENCODER_LEN, MAX_MODEL_LEN, World, post, request

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}

Error = tuple[int, str, str | None]


def bad(code: str, param: str | None, status: int = 400) -> Error:
    return status, code, param


def unsupported(**fields: Any) -> list[tuple[dict[str, Any], Error]]:
    return [({name: value}, bad("unsupported_parameter", name)) for name, value in fields.items()]


class Missing(Enum):
    """Stands for a field that is left out."""

    FIELD = "missing"


MISSING = Missing.FIELD
# On both endpoints.
SHARED_ROWS: list[tuple[dict[str, Any], Error]] = [
    ({"model": "unloaded"}, bad("engine_unavailable", None, 503)),
    ({"best_of": 2, "stream": True, "temperature": 0}, bad("invalid_value", "best_of")),
    *(({"prompt_logprobs": value}, bad("invalid_type", "prompt_logprobs")) for value in ("x", True, 1.5)),
    ({"stop_token_ids": ["a"]}, bad("invalid_type", "stop_token_ids")),
    ({"ignore_eos": 1}, bad("invalid_type", "ignore_eos")),
    ({"source_language": "fr"}, bad("not_encoder_decoder", "source_language")),
    ({"prompt_embeds": "AAAA"}, bad("feature_disabled", "prompt_embeds")),
    *unsupported(dry_sequence_breakers=["x"], mirostat_mode=2, tfs=0.5),
]
COMPLETION_ROWS: list[tuple[dict[str, Any], Error]] = [
    *SHARED_ROWS,
    ({"prompt": ""}, bad("empty_prompt", "prompt")),  # this model has no BOS
    ({"encoder_prompt": "a"}, bad("conflicting_parameters", "encoder_prompt")),
    ({"prompt": "a" * 990, "max_tokens": 11}, bad("context_length_exceeded", "max_tokens")),
    ({"echo": "yes"}, bad("invalid_type", "echo")),
    *unsupported(top_logprobs=1, add_special_tokens=False),
]


def body_for(base: dict[str, Any], fields: dict[str, Any]) -> bytes:
    merged = {name: value for name, value in (base | fields).items() if value is not MISSING}
    return json.dumps(merged).encode()


def ids(rows: list[tuple[dict[str, Any], Error]]) -> list[str]:
    return [f"{fields!s:.50}" for fields, _ in rows]


@pytest.mark.parametrize(("fields", "error"), COMPLETION_ROWS, ids=ids(COMPLETION_ROWS))
def test_bad_completion(world: World, fields: dict[str, Any], error: Error) -> None:
    answer = post(world.port, COMPLETIONS, body_for({"model": "tiny", "prompt": "a"}, fields))
    assert answer.error == error
    assert ("retry-after" in answer.headers) == (answer.status == 503)


ENCODER_DECODER_ROWS: list[tuple[dict[str, Any], Error]] = [
    ({"encoder_prompt": ["a", 5], "decoder_prompt": "b"}, bad("invalid_prompt", "encoder_prompt[1]")),
    ({"encoder_prompt": []}, bad("invalid_prompt", "encoder_prompt")),
    ({"encoder_prompt": ["a"] * 65}, bad("too_many_prompts", "encoder_prompt")),
    ({"prompt": ["a", "b"], "decoder_prompt": [[1], [2], [3]]}, bad("invalid_prompt", "decoder_prompt")),
    ({"prompt": "a", "target_language": "tlh"}, bad("unknown_language", "target_language")),
    ({"prompt": "a", "source_language": "tlh"}, bad("unknown_language", "source_language")),
    ({"prompt": [1], "source_language": "fr"}, bad("invalid_value", "source_language")),
    ({"prompt": "a", "target_language": 5}, bad("invalid_type", "target_language")),
    ({"prompt": "a", "debug": True, "stream": True}, bad("invalid_value", "debug")),
    ({"encoder_prompt": [1, 999], "decoder_prompt": "b"}, bad("invalid_token_id", "encoder_prompt[1]")),
    ({"prompt": ["a", "b"], "decoder_prompt": [999]}, bad("invalid_token_id", "decoder_prompt[0]")),
    ({"prompt": [[1], [999]], "decoder_prompt": "b"}, bad("invalid_token_id", "prompt[1][0]")),
    ({"prompt": [1] * (MAX_ENCODER_LEN + 1)}, bad("context_length_exceeded", "encoder_prompt")),
    ({"prompt": "a", "decoder_prompt": "b" * MAX_MODEL_LEN}, bad("context_length_exceeded", "decoder_prompt")),
]


@pytest.mark.parametrize(("fields", "error"), ENCODER_DECODER_ROWS, ids=ids(ENCODER_DECODER_ROWS))
def test_bad_encoder_decoder_completion(world: World, fields: dict[str, Any], error: Error) -> None:
    assert post(world.port, COMPLETIONS, {"model": "org/translator"} | fields).error == error


CHAT_ROWS: list[tuple[dict[str, Any], Error]] = [
    *SHARED_ROWS,
    ({"messages": [USER | {"content": "refused by template"}]}, bad("template_error", "messages")),
    ({"messages": [USER | {"content": ""}]}, bad("empty_prompt", "messages")),
    *(({"logprobs": True, "top_logprobs": value}, bad("invalid_type", "top_logprobs")) for value in ("x", True)),
    *(({"logprobs": value, "top_logprobs": 2}, bad("invalid_value", "top_logprobs")) for value in (MISSING, False)),
    ({"max_completion_tokens": 5000}, bad("context_length_exceeded", "max_completion_tokens")),
    ({"max_completion_tokens": 5, "max_tokens": 6}, bad("conflicting_parameters", "max_completion_tokens")),
    *unsupported(
        functions=[{}],
        modalities=["audio"],
        reasoning_effort="high",
        documents=[{}],
    ),
]


@pytest.mark.parametrize(("fields", "error"), CHAT_ROWS, ids=ids(CHAT_ROWS))
def test_bad_chat(world: World, fields: dict[str, Any], error: Error) -> None:
    assert post(world.port, CHAT, body_for({"model": "tiny", "messages": [USER]}, fields)).error == error


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
