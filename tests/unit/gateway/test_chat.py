"""POST /v1/chat/completions, seen by the unmodified OpenAI client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from unit.gateway.fakes import DECODER_START, LENGTH, MAX_MODEL_LEN, World, deltas

HI: list[Any] = [{"role": "user", "content": "hi"}]


def test_reply_is_an_assistant_message(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=HI)
    assert reply.id.startswith("chatcmpl-")
    assert reply.object == "chat.completion"
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello world", "stop")
    assert reply.usage is not None and (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 3)


def test_stream_names_the_role_first_and_the_finish_reason_last(world: World, client: openai.OpenAI) -> None:
    world.tiny.scripts["streamed"] = deltas("a", "b", "", finish=LENGTH)
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "streamed"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    first, *middle, finish, usage = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in middle] == ["a", "b"]
    assert finish.choices[0].finish_reason == "length" and finish.choices[0].delta.content is None
    assert usage.choices == [] and usage.usage is not None and usage.usage.total_tokens == 8 + 3


def test_each_choice_of_a_stream_is_opened_once(client: openai.OpenAI) -> None:
    roles, texts = [0, 0, 0], ["", "", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=HI, n=3, stream=True):
        choice = chunk.choices[0]
        roles[choice.index] += choice.delta.role == "assistant"
        texts[choice.index] += choice.delta.content or ""
    assert roles == [1, 1, 1]
    assert texts == ["Hello world"] * 3


@pytest.mark.parametrize(
    ("extra", "max_tokens"),
    [({}, MAX_MODEL_LEN - 2), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 6}, 6)],
)
def test_output_limit(world: World, client: openai.OpenAI, extra: dict[str, Any], max_tokens: int) -> None:
    client.chat.completions.create(model="tiny", messages=HI, **extra)
    assert world.tiny.requests[-1].sampling.max_tokens == max_tokens


def test_template_gets_text_parts_joined_and_no_foreign_fields(world: World, client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer: Any = {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None, "annotations": []}
    messages: list[Any] = [{"role": "system", "content": parts, "name": "me"}, *HI, answer, *HI]
    client.chat.completions.create(model="tiny", messages=messages)
    rendered, adds_generation_prompt, continues = world.tiny.rendered[-1]
    assert rendered == [
        {"role": "system", "content": "one\ntwo", "name": "me"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "hi"},
    ]
    assert adds_generation_prompt and not continues


@pytest.mark.parametrize(
    ("extra", "flags"),
    [
        ({"continue_final_message": True}, (False, True)),
        ({"add_generation_prompt": False}, (False, False)),
        ({}, (True, False)),
    ],
)
def test_template_flags(world: World, client: openai.OpenAI, extra: dict[str, bool], flags: tuple[bool, bool]) -> None:
    messages: list[Any] = [*HI, {"role": "assistant", "content": "well"}]
    client.chat.completions.create(model="tiny", messages=messages, extra_body=extra)
    assert world.tiny.rendered[-1][1:] == flags


def test_encoder_decoder_model_reads_the_last_user_message(world: World, client: openai.OpenAI) -> None:
    messages: list[Any] = [*HI, {"role": "assistant", "content": "salut"}, {"role": "user", "content": "bye"}]
    client.chat.completions.create(model="org/translator", messages=messages)
    prompt = world.translator.requests[-1].prompt
    assert prompt.encoder_token_ids == tuple(b"bye")
    assert prompt.token_ids == (DECODER_START,)


def test_encoder_decoder_model_continues_the_final_message(world: World, client: openai.OpenAI) -> None:
    messages: list[Any] = [*HI, {"role": "assistant", "content": "<fr>"}]
    client.chat.completions.create(
        model="org/translator", messages=messages, extra_body={"continue_final_message": True}
    )
    prompt = world.translator.requests[-1].prompt
    assert prompt.encoder_token_ids == tuple(b"hi")
    assert prompt.token_ids == (DECODER_START, *b"<fr>")


@pytest.mark.asyncio
async def test_async_client_streams(world: World) -> None:
    async with openai.AsyncOpenAI(base_url=world.server.base_url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello world"
