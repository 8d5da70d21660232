"""Token ids, counts in every chunk, tenants, priorities, salts, tools: as the OpenAI client and plain HTTP see them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import openai
import pytest

from trivium.outputs import ChoiceDelta, TokenLogprobs
from unit.gateway.fakes import HELLO, VOCAB_SIZE, World, deltas, post

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def events(world: World, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = post(world.port, path, {"model": "tiny", "stream": True} | body)
    lines = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    assert answer.status == 200 and lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("path", "prompt"), [(COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": HI})])
def test_every_chunk_counts_the_tokens_so_far(world: World, path: str, prompt: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(world, path, prompt | {"n": 2, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"] == 6
    assert len(set(counts)) == (6 if path == COMPLETIONS else 7)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {2} and last["choices"] == []


def test_the_client_reads_counts_of_a_stream_with_logprobs(world: World, client: openai.OpenAI) -> None:
    plain = [step for step in deltas(*HELLO) if isinstance(step, ChoiceDelta)]
    world.tiny.scripts["counted"] = [replace(step, logprobs=(TokenLogprobs(-0.5, 1),)) for step in plain]
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "counted"}],
        stream=True,
        stream_options=options,
        logprobs=True,
    )
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [0, 1, 2, 3]
    assert last.usage is not None and last.usage.completion_tokens == 3


@pytest.mark.parametrize(
    "options", [{"continuous_usage_stats": True}, {"continuous_usage_stats": True, "include_usage": False}]
)
def test_counts_in_every_chunk_need_the_one_at_the_end(world: World, options: dict[str, Any]) -> None:
    body = {"model": "tiny", "prompt": "a", "stream": True, "stream_options": options}
    assert post(world.port, COMPLETIONS, body).error == (400, "invalid_value", "stream_options.continuous_usage_stats")


def test_completions_show_the_token_ids_of_each_prompt_and_output(world: World) -> None:
    body = {"model": "tiny", "prompt": ["ab", "c"], "n": 2, "return_token_ids": True}
    choices = post(world.port, COMPLETIONS, body).json["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[97, 98]] * 2 + [[99]] * 2
    assert [choice["token_ids"] for choice in choices] == [[65, 65, 65]] * 4
    plain = post(world.port, COMPLETIONS, {"model": "tiny", "prompt": "ab", "return_token_ids": False}).json
    assert "token_ids" not in plain["choices"][0] and "prompt_token_ids" not in plain["choices"][0]


def test_a_chat_shows_them_too(world: World) -> None:
    answer = post(world.port, CHAT, {"model": "tiny", "messages": HI, "return_token_ids": True}).json
    assert answer["prompt_token_ids"] == list(b"hi") and answer["choices"][0]["token_ids"] == [65, 65, 65]


def test_streams_show_ids_once_and_also_where_there_is_no_text_yet(world: World) -> None:
    world.tiny.scripts["late"] = deltas("", "a", "")
    chunks = [chunk["choices"][0] for chunk in events(world, COMPLETIONS, {"prompt": "late", "return_token_ids": True})]
    assert [chunk["token_ids"] for chunk in chunks] == [[65], [65], [65]]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [list(b"late"), None, None]
    late = [{"role": "user", "content": "late"}]
    opening, *rest = events(world, CHAT, {"messages": late, "return_token_ids": True})
    assert opening["prompt_token_ids"] == list(b"late") and "token_ids" not in opening["choices"][0]
    assert [chunk["choices"][0]["token_ids"] for chunk in rest] == [[65], [65], [65]]
    assert not any("prompt_token_ids" in chunk for chunk in rest)


def test_priority_salt_and_id_reach_the_engine(world: World) -> None:
    body = {"model": "tiny", "prompt": "a", "priority": -3, "cache_salt": "s", "request_id": "job 7"}
    answer = post(world.port, COMPLETIONS, body, X_Request_Id="mine")
    request = world.tiny.requests[-1]
    assert (request.priority, request.cache_salt, request.request_id) == (-3, "s", "cmpl-job 7")
    assert answer.json["id"] == "cmpl-job 7" and answer.headers["x-request-id"] == "mine"


def test_tenants_are_users_and_keys_and_neither_shows(world: World) -> None:
    def tenant(user: str | None, **headers: str) -> str:
        post(world.port, COMPLETIONS, {"model": "tiny", "prompt": "a", "user": user}, **headers)
        return world.tiny.requests[-1].tenant

    named = [tenant("ann"), tenant("bob"), tenant(None, Authorization="Bearer secret")]
    named += [tenant("ann", Authorization="Bearer secret"), tenant(None)]
    assert len(set(named)) == 5 and named[-1] == ""
    assert tenant("ann") == named[0] and tenant("ann", Authorization="Bearer secret") == named[3]
    assert not any(word in "".join(named) for word in ("ann", "bob", "secret"))


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"truncate_prompt_tokens": 3}, b"def"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, b"abc"),
        ({"truncate_prompt_tokens": -1}, b"abcdef"),
        ({"prompt": [1] * 2000, "truncate_prompt_tokens": -1, "max_tokens": 990}, bytes([1] * 10)),
    ],
)
def test_prompts_are_cut_where_that_is_asked_for(world: World, fields: dict[str, Any], ids: bytes) -> None:
    assert post(world.port, COMPLETIONS, {"model": "tiny", "prompt": "abcdef"} | fields).status == 200
    assert world.tiny.requests[-1].prompt.token_ids == tuple(ids)


def test_an_encoder_input_keeps_its_beginning(world: World) -> None:
    body = {"model": "org/translator", "prompt": "a" * 500, "truncate_prompt_tokens": 7}
    assert post(world.port, COMPLETIONS, body).status == 200
    assert world.translator.requests[-1].prompt.encoder_token_ids == tuple(b"aaaaaaa")
    assert (
        post(
            world.port, "/v1/translations", {"model": "org/translator", "input": "b" * 500, "truncate_prompt_tokens": 3}
        ).status
        == 200
    )
    assert world.translator.requests[-1].prompt.encoder_token_ids == tuple(b"bbb")


def test_a_chat_keeps_its_end(world: World) -> None:
    assert post(world.port, CHAT, {"model": "tiny", "messages": HI, "truncate_prompt_tokens": 1}).status == 200
    assert world.tiny.requests[-1].prompt.token_ids == tuple(b"i")


@pytest.mark.parametrize(("choice", "shown"), [(None, [TOOL]), ("auto", [TOOL]), ("none", None)])
def test_tools_reach_the_template_unless_none_may_be_called(world: World, choice: str | None, shown: Any) -> None:
    body = {"model": "tiny", "messages": HI, "tools": [TOOL], "tool_choice": choice}
    assert post(world.port, CHAT, body | {"chat_template_kwargs": {"enable_thinking": False}}).status == 200
    assert world.tiny.template_inputs[-1] == (shown, {"enable_thinking": False})


def test_calls_of_earlier_turns_reach_the_template(world: World, client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    messages: Any = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "content": "42", "tool_call_id": "c1"}]
    client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])  # type: ignore[list-item]
    rendered = world.tiny.rendered[-1][0]
    assert rendered[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert rendered[2] == {"role": "tool", "content": "42", "tool_call_id": "c1"}


def test_an_encoder_decoder_model_takes_no_tools(world: World) -> None:
    body = {"model": "org/translator", "messages": HI, "tools": [TOOL]}
    assert post(world.port, CHAT, body).error == (400, "invalid_value", "tools")


EMBEDS = [{"role": "user", "content": [{"type": "prompt_embeds", "prompt_embeds": "AAAA"}]}]
TOKENIZED: list[tuple[dict[str, Any], list[int], list[str] | None]] = [
    ({"model": "tiny", "prompt": "ab"}, [97, 98], None),
    ({"model": "tiny", "prompt": "ab", "return_token_strs": True, "add_special_tokens": False}, [97, 98], ["a", "b"]),
    ({"model": "tiny", "messages": HI, "tools": [TOOL]}, [104, 105], None),
    ({"model": "org/translator", "prompt": "ab"}, [97, 98], None),
]


@pytest.mark.parametrize(("body", "tokens", "strings"), TOKENIZED)
def test_tokenize_counts_and_shows(world: World, body: dict[str, Any], tokens: list[int], strings: Any) -> None:
    limit = 400 if body["model"] == "org/translator" else 1000
    answer = post(world.port, "/tokenize", body)
    assert answer.json == {"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": strings}


def test_detokenize_is_the_way_back(world: World) -> None:
    body = {"model": "tiny", "tokens": [97, 98, 256]}
    assert post(world.port, "/detokenize", body).json == {"prompt": "ab<256>"}
    assert post(world.port, "/detokenize", body | {"skip_special_tokens": True}).json == {"prompt": "ab"}


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/tokenize", {"prompt": "a"}, (400, "missing_model", "model")),
        ("/tokenize", {"model": "tiny"}, (400, "missing_prompt", "prompt")),
        ("/tokenize", {"model": "tiny", "prompt": "a", "messages": HI}, (400, "missing_prompt", "prompt")),
        ("/tokenize", {"model": "tiny", "prompt": ["a"]}, (400, "invalid_type", "prompt")),
        ("/tokenize", {"model": "tiny", "messages": [{}]}, (400, "invalid_messages", "messages[0].role")),
        (
            "/tokenize",
            {"model": "tiny", "messages": HI, "chat_template": "x"},
            (400, "template_not_allowed", "chat_template"),
        ),
        (
            "/tokenize",
            {"model": "tiny", "messages": EMBEDS},
            (400, "invalid_prompt_embeds", "messages[0].content[0].prompt_embeds"),
        ),
        ("/tokenize", {"model": "org/translator", "messages": HI}, (400, "invalid_value", "messages")),
        ("/tokenize", {"model": "nobody", "prompt": "a"}, (404, "model_not_found", "model")),
        ("/tokenize", {"model": "unloaded", "prompt": "a"}, (503, "engine_unavailable", None)),
        ("/detokenize", {"model": "tiny"}, (400, "invalid_token_id", "tokens")),
        ("/detokenize", {"model": "tiny", "tokens": "12"}, (400, "invalid_token_id", "tokens")),
        ("/detokenize", {"model": "tiny", "tokens": [1, -1]}, (400, "invalid_token_id", "tokens[1]")),
        ("/detokenize", {"model": "tiny", "tokens": [VOCAB_SIZE]}, (400, "invalid_token_id", "tokens[0]")),
        ("/detokenize", b"{", (400, "invalid_json", None)),
    ],
)
def test_bad_tokenize_requests(world: World, path: str, body: Any, error: tuple[int, str, str | None]) -> None:
    assert post(world.port, path, body).error == error


BAD: list[tuple[dict[str, Any], tuple[int, str, str]]] = [
    *(({"priority": value}, (400, "invalid_value", "priority")) for value in (2**31, -(2**31) - 1)),
    ({"priority": "high"}, (400, "invalid_type", "priority")),
    *(({"cache_salt": value}, (400, "invalid_value", "cache_salt")) for value in ("", "x" * 257)),
    *(({"request_id": value}, (400, "invalid_request_id", "request_id")) for value in ("", "x" * 129, "a\nb", "ä")),
    *(
        ({"truncate_prompt_tokens": value}, (400, "invalid_value", "truncate_prompt_tokens"))
        for value in (0, -2, 2**40)
    ),
    ({"truncation_side": "up"}, (400, "invalid_value", "truncation_side")),
    ({"return_token_ids": 1}, (400, "invalid_type", "return_token_ids")),
    ({"thinking_token_budget": 5}, (400, "unsupported_parameter", "thinking_token_budget")),
    ({"logprob_token_ids": [5]}, (400, "unsupported_parameter", "logprob_token_ids")),
]


@pytest.mark.parametrize(("fields", "error"), BAD, ids=lambda value: f"{value!s:.60}")
def test_bad_details(world: World, fields: dict[str, Any], error: tuple[int, str, str]) -> None:
    assert post(world.port, COMPLETIONS, {"model": "tiny", "prompt": "a"} | fields).error == error
    assert post(world.port, CHAT, {"model": "tiny", "messages": HI} | fields).error == error


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": "f"}, "invalid_tools", "tools"),
        ({"tools": [TOOL] * 129}, "invalid_tools", "tools"),
        ({"tools": [{}]}, "invalid_tools", "tools[0]"),
        ({"tools": [{"type": "function", "function": {}}]}, "invalid_tools", "tools[0].function.name"),
        ({"tools": [function(), function()]}, "invalid_tools", "tools[1].function.name"),
        ({"tools": [function(parameters=[])]}, "invalid_tools", "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "invalid_tools", "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TOOL]}, "invalid_tools", "tool_choice"),
        ({"tool_choice": function(name="other"), "tools": [TOOL]}, "invalid_tools", "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": [TOOL]}, "invalid_tools", "tool_choice"),
        ({"tool_choice": function()}, "invalid_tools", "tool_choice"),
        (
            {"tool_choice": "required", "tools": [TOOL], "response_format": {"type": "json_object"}},
            "conflicting_parameters",
            "tool_choice",
        ),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "unsupported_parameter", "parallel_tool_calls"),
        ({"chat_template_kwargs": 5}, "invalid_type", "chat_template_kwargs"),
    ],
    ids=lambda value: f"{value!s:.60}",
)
def test_bad_tools(world: World, fields: dict[str, Any], code: str, param: str) -> None:
    assert post(world.port, CHAT, {"model": "tiny", "messages": HI} | fields).error == (400, code, param)


def test_a_refused_field_says_why(world: World) -> None:
    answer = post(world.port, COMPLETIONS, {"model": "tiny", "prompt": "a", "suffix": "x"})
    assert answer.error == (400, "unsupported_parameter", "suffix")
    assert answer.json["error"]["message"] == (
        "suffix is not supported: no model here fills gaps; what comes before the gap is the prompt"
    )
