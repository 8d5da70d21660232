"""`prompt_embeds` over HTTP: what is taken, and in which order it is answered. Hostile ones: tests/hostile."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import safetensors.torch
import torch

from embeds import encoded, raw
from trivium.inputs import EmbedsPrompt, ExplicitEncoderDecoderPrompt, MixedPrompt, TokensPrompt
from trivium.outputs import NO_TOKEN_LOGPROBS, TokenLogprobs
from trivium.prompts import encode_prompt
from trivium_gateway.logprobs import CompletionLogprobsWriter, LogprobsForm, TokenTexts
from unit.gateway.fakes import HIDDEN_SIZE, MAX_ENCODER_LEN, MAX_MODEL_LEN, FakeEngine, RunningServer, World, make_info

ROWS = torch.arange(3 * HIDDEN_SIZE, dtype=torch.float32).reshape(3, HIDDEN_SIZE) / 7


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    tiny, translator = FakeEngine(make_info("tiny")), FakeEngine(make_info("org/translator", is_encoder_decoder=True))
    server = RunningServer({"tiny": tiny, "org/translator": translator}, enable_prompt_embeds=True)
    yield World(server, tiny, translator)
    server.stop()


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=world.server.base_url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def safe(rows: torch.Tensor) -> str:
    return base64.b64encode(safetensors.torch.save({"prompt_embeds": rows.contiguous()})).decode()


def last_embeds(engine: FakeEngine) -> np.ndarray[Any, Any]:
    prompt = engine.requests[-1].prompt
    embeds = prompt.embeds or prompt.encoder_embeds
    assert embeds is not None
    return np.frombuffer(embeds.data, "<f4").reshape(embeds.num_tokens, embeds.hidden_size)


@pytest.mark.parametrize("form", [encoded, raw, safe])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_form_and_dtype_arrives_as_the_same_numbers(
    world: World, client: openai.OpenAI, form: Any, dtype: torch.dtype
) -> None:
    rows = ROWS.to(dtype)
    completion = client.completions.create(model="tiny", prompt="", extra_body={"prompt_embeds": form(rows)})
    assert completion.choices[0].text == "Hello world"
    assert completion.usage is not None and completion.usage.prompt_tokens == 3
    assert np.array_equal(last_embeds(world.tiny), rows.float().numpy())
    assert world.tiny.requests[-1].prompt.token_ids == (0, 0, 0)


@pytest.mark.parametrize("rows", [ROWS.T.contiguous().T, ROWS[::2], ROWS[1:], torch.nn.Parameter(ROWS)])
def test_a_view_arrives_as_what_it_shows(world: World, client: openai.OpenAI, rows: torch.Tensor) -> None:
    if isinstance(rows, torch.nn.Parameter):
        rows = rows * 1  # as an embedding layer returns it, with a gradient to come
    client.completions.create(model="tiny", prompt="", extra_body={"prompt_embeds": encoded(rows)})
    assert np.array_equal(last_embeds(world.tiny), rows.detach().numpy())


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], "", None])
def test_embeddings_are_answered_ahead_of_prompts(world: World, client: openai.OpenAI, prompt: Any) -> None:
    before = len(world.tiny.requests)
    items = [encoded(ROWS), raw(2 * ROWS)]
    completion = client.completions.create(model="tiny", prompt=prompt, n=2, extra_body={"prompt_embeds": items})
    prompts = [request.prompt for request in world.tiny.requests[before:]]
    prompts.sort(key=lambda item: item.embeds is None)
    num_texts = 2 if prompt == ["a", "b"] else bool(prompt)
    assert [item.embeds is not None for item in prompts] == [True, True] + [False] * num_texts
    assert [choice.index for choice in completion.choices] == list(range(2 * (2 + num_texts)))
    ids = [request.request_id.rpartition("-")[2] for request in world.tiny.requests[before:]]
    by_id = dict(zip(ids, (request.prompt for request in world.tiny.requests[before:]), strict=True))
    first, second = by_id["0"].embeds, by_id["1"].embeds
    assert first is not None and second is not None
    assert np.array_equal(np.frombuffer(second.data, "<f4"), 2 * np.frombuffer(first.data, "<f4"))


def test_a_stream_begins_with_the_embeddings_choice(client: openai.OpenAI) -> None:
    chunks = client.completions.create(
        model="tiny", prompt="", stream=True, extra_body={"prompt_embeds": [encoded(ROWS), encoded(ROWS)]}
    )
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "Hello world", 1: "Hello world"}


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": "x"}]])
def test_chat_takes_embeddings_ahead_of_messages(world: World, client: openai.OpenAI, messages: Any) -> None:
    before = len(world.tiny.requests)
    completion = client.chat.completions.create(
        model="tiny", messages=messages, extra_body={"prompt_embeds": encoded(ROWS)}
    )
    assert [choice.message.content for choice in completion.choices] == ["Hello world"] * (1 + len(messages))
    assert sum(request.prompt.embeds is not None for request in world.tiny.requests[before:]) == 1


@pytest.mark.parametrize("decoder", [None, "ab", [7, 8]])
def test_an_encoder_decoder_model_reads_embeddings_beside_any_decoder_prompt(
    world: World, client: openai.OpenAI, decoder: Any
) -> None:
    body: dict[str, Any] = {"prompt_embeds": encoded(ROWS)}
    if decoder is not None:
        body["decoder_prompt"] = decoder
    client.completions.create(model="org/translator", prompt="", extra_body=body)
    prompt = world.translator.requests[-1].prompt
    assert prompt.embeds is None and prompt.encoder_token_ids == (0, 0, 0)
    assert np.array_equal(last_embeds(world.translator), ROWS.numpy())
    assert list(prompt.token_ids[1:]) == (list(b"ab") if decoder == "ab" else decoder or [])


def test_echo_of_an_encoder_decoder_model_shows_the_decoder_prompt(client: openai.OpenAI) -> None:
    body = {"prompt_embeds": encoded(ROWS), "decoder_prompt": "ab"}
    completion = client.completions.create(model="org/translator", prompt="", echo=True, extra_body=body)
    assert completion.choices[0].text == "abHello world"


def test_echo_shows_no_text_where_there_is_none(world: World, client: openai.OpenAI) -> None:
    body = {"prompt_embeds": encoded(ROWS)}
    completion = client.completions.create(model="tiny", prompt="", echo=True, extra_body=body)
    assert completion.choices[0].text == "Hello world"


def test_log_probabilities_are_of_tokens_and_none_of_embeddings(world: World) -> None:
    """Of a decoder prompt: start token, three rows, two tokens."""
    value = TokenLogprobs(-1.5, 2)
    of_prompt = (*[NO_TOKEN_LOGPROBS] * 3, value, value)
    parts: list[Any] = [EmbedsPrompt(prompt_embeds=ROWS), TokensPrompt(prompt_token_ids=[98, 99])]
    prompt = ExplicitEncoderDecoderPrompt(encoder_prompt="src", decoder_prompt=MixedPrompt(prompt_parts=parts))
    encoded_prompt = asyncio.run(encode_prompt(prompt, world.translator, world.translator.model_info))
    assert encoded_prompt.token_ids == (256, 0, 0, 0, 98, 99)
    texts = TokenTexts(world.translator)
    asyncio.run(texts.load(encoded_prompt.token_ids))
    shown = texts.prompt_dicts(encoded_prompt, of_prompt, 0)
    assert shown[:4] == [None] * 4
    assert [item and list(item) for item in shown[4:]] == [[98], [99]]
    writer = CompletionLogprobsWriter(texts, LogprobsForm(num_top=0, echo=True))
    written = writer.prompt(encoded_prompt, "bc", of_prompt)
    assert written.tokens == ["</s>", "b", "c"] and written.token_logprobs == [None, -1.5, -1.5]
    assert written.text_offset == [0, 0, 1]


def user(*parts: dict[str, Any]) -> list[Any]:
    return [{"role": "system", "content": "be kind"}, {"role": "user", "content": list(parts)}]


@pytest.mark.parametrize("key", ["data", "prompt_embeds"])
@pytest.mark.parametrize("form", [encoded, raw, safe])
def test_embeddings_in_the_middle_of_a_message(world: World, client: openai.OpenAI, key: str, form: Any) -> None:
    text, rows = {"type": "text", "text": "ab"}, {"type": "prompt_embeds", key: form(ROWS)}
    completion = client.chat.completions.create(model="tiny", messages=user(text, rows, text, rows))
    assert completion.choices[0].message.content == "Hello world"
    prompt = world.tiny.requests[-1].prompt
    assert prompt.token_ids == (97, 98, 0, 0, 0, 97, 98, 0, 0, 0)
    assert prompt.embeds is not None and prompt.embeds.places == ((2, 5), (7, 10))
    assert np.array_equal(last_embeds(world.tiny), np.concatenate((ROWS, ROWS)))
    assert completion.usage is not None and completion.usage.prompt_tokens == 10
    rendered = world.tiny.rendered[-1][0]
    assert rendered[-1]["content"] == [text, {"type": "prompt_embeds"}, text, {"type": "prompt_embeds"}]


def test_a_message_of_embeddings_for_an_encoder_decoder_model(world: World, client: openai.OpenAI) -> None:
    rows, text = {"type": "prompt_embeds", "data": encoded(ROWS)}, {"type": "text", "text": "a"}
    client.chat.completions.create(model="org/translator", messages=user(rows))
    assert np.array_equal(last_embeds(world.translator), ROWS.numpy())
    with pytest.raises(openai.BadRequestError, match="text or one part of embeddings, not both"):
        client.chat.completions.create(model="org/translator", messages=user(rows, text))


WRONG_PARTS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "invalid_prompt_embeds", "messages[1].content[0]"),
    ({"data": "AAAA", "prompt_embeds": "AAAA"}, "invalid_prompt_embeds", "messages[1].content[0]"),
    ({"data": "%%"}, "invalid_prompt_embeds", "messages[1].content[0].data"),
    ({"prompt_embeds": raw(ROWS * float("nan"))}, "non_finite", "messages[1].content[0].prompt_embeds"),
    ({"data": encoded(torch.zeros(2, HIDDEN_SIZE + 1))}, "invalid_prompt_embeds", "messages"),
    ({"data": encoded(torch.zeros(MAX_MODEL_LEN + 1, HIDDEN_SIZE))}, "context_length_exceeded", "messages"),
]


@pytest.mark.parametrize(("part", "code", "param"), WRONG_PARTS, ids=lambda value: str(value)[:30])
def test_wrong_parts_of_a_message_are_refused_by_name(
    client: openai.OpenAI, part: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=user({"type": "prompt_embeds", **part}))
    assert (caught.value.code, caught.value.param) == (code, param)


def test_too_many_parts_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="65 parts are embeddings, at most 64"):
        client.chat.completions.create(model="tiny", messages=user(*[{"type": "prompt_embeds", "data": "AAAA"}] * 65))


def refused(client: openai.OpenAI, model: str = "tiny", **body: Any) -> dict[str, Any]:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt=body.pop("prompt", ""), extra_body=body)
    error: dict[str, Any] = caught.value.body  # type: ignore[assignment]
    return error


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_one_wrong_of_three_is_named_and_none_runs(world: World, client: openai.OpenAI, endpoint: str) -> None:
    before = len(world.tiny.requests)
    for wrong, code in (("AAAA", "invalid_prompt_embeds"), (encoded(torch.zeros(2, 9)), "invalid_prompt_embeds")):
        body = {"prompt_embeds": [encoded(ROWS), wrong, encoded(ROWS)]}
        with pytest.raises(openai.BadRequestError) as caught:
            if endpoint == "chat":
                client.chat.completions.create(model="tiny", messages=[], extra_body=body)
            else:
                client.completions.create(model="tiny", prompt="a", extra_body=body)
        assert (caught.value.code, caught.value.param) == (code, "prompt_embeds[1]")
    assert len(world.tiny.requests) == before


def test_too_long_for_the_context(client: openai.OpenAI) -> None:
    long = [encoded(ROWS), encoded(torch.zeros(MAX_MODEL_LEN + 1, HIDDEN_SIZE))]
    error = refused(client, prompt_embeds=long)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt_embeds[1]")
    error = refused(client, "org/translator", prompt_embeds=encoded(torch.zeros(MAX_ENCODER_LEN + 1, HIDDEN_SIZE)))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt_embeds")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"encoder_prompt": "a", "prompt": "b"}, "encoder_prompt"),
        ({"decoder_prompt": "a"}, "encoder_prompt"),
    ],
)
def test_fields_that_contradict_embeddings_are_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    assert refused(client, prompt_embeds=encoded(ROWS), **fields)["param"] == param


def test_off_is_off_on_every_route() -> None:
    server = RunningServer({"tiny": FakeEngine(make_info("tiny"))})
    try:
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            assert refused(client, prompt_embeds=encoded(ROWS))["code"] == "feature_disabled"
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="tiny", messages=[], extra_body={"prompt_embeds": "AAAA"})
            assert caught.value.code == "feature_disabled"
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="tiny", messages=user({"type": "prompt_embeds", "data": "AAAA"}))
            assert (caught.value.code, caught.value.param) == ("feature_disabled", "messages[1].content[0]")
    finally:
        server.stop()


def test_bodies_of_embeddings_may_be_larger_than_others(client: openai.OpenAI) -> None:
    wide = torch.zeros(9 * 2**20 // 4 // 900, 900)
    error = refused(client, prompt_embeds=encoded(wide))
    assert error["code"] == "invalid_prompt_embeds" and "900" in error["message"]
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt="", extra_body={"prompt_embeds": "A" * (64 * 2**20)})
    assert caught.value.status_code == 413
