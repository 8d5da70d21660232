"""`prompt_embeds` over HTTP: what is taken, and in which order it is answered. Hostile ones: tests/hostile."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import safetensors.torch
import torch

from embeds import encoded, raw
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
        ({"echo": True}, "echo"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"encoder_prompt": "a", "prompt": "b"}, "encoder_prompt"),
        ({"decoder_prompt": "a"}, "encoder_prompt"),
    ],
)
def test_what_needs_tokens_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    assert refused(client, prompt_embeds=encoded(ROWS), **fields)["param"] == param


def test_off_is_off_on_every_route() -> None:
    server = RunningServer({"tiny": FakeEngine(make_info("tiny"))})
    try:
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            assert refused(client, prompt_embeds=encoded(ROWS))["code"] == "feature_disabled"
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="tiny", messages=[], extra_body={"prompt_embeds": "AAAA"})
            assert caught.value.code == "feature_disabled"
    finally:
        server.stop()


def test_bodies_of_embeddings_may_be_larger_than_others(client: openai.OpenAI) -> None:
    wide = torch.zeros(9 * 2**20 // 4 // 900, 900)
    error = refused(client, prompt_embeds=encoded(wide))
    assert error["code"] == "invalid_prompt_embeds" and "900" in error["message"]
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt="", extra_body={"prompt_embeds": "A" * (64 * 2**20)})
    assert caught.value.status_code == 413
