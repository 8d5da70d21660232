"""POST /v1/completions, seen by the unmodified OpenAI client."""

from __future__ import annotations

import openai
import pytest

from trivium.outputs import ChoiceDelta
from unit.gateway.fakes import DECODER_START, LENGTH, MAX_MODEL_LEN, STOP, World, deltas


def test_text_prompt_gives_one_choice_with_usage(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt="abc", max_tokens=5)
    assert completion.id.startswith("cmpl-")
    assert completion.object == "text_completion"
    assert completion.model == "tiny"
    (choice,) = completion.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, "Hello world", "stop")
    assert completion.usage is not None
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 3, 6)


def test_sampling_fields_reach_the_engine(world: World, client: openai.OpenAI) -> None:
    client.completions.create(
        model="tiny",
        prompt="abc",
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        n=2,
        seed=11,
        stop=["x", "y"],
        user="someone",
        extra_body={
            "top_k": 4,
            "min_p": 0.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [7],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        },
    )
    sampling = world.tiny.requests[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.n) == (7, 0.5, 0.9, 2)
    assert (sampling.seed, sampling.stop, sampling.top_k, sampling.min_p) == (11, ("x", "y"), 4, 0.1)
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.stop_token_ids) == (2, True, (7,))
    assert sampling.include_stop_str_in_output and not sampling.skip_special_tokens


def test_penalties_bans_and_filters_reach_the_engine(world: World, client: openai.OpenAI) -> None:
    extra = {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 3,
        "bad_words": ["foo"],
        "allowed_token_ids": [4, 5],
        "typical_p": 0.9,
        "top_a": 0.2,
        "epsilon_cutoff": 3,
        "eta_cutoff": 4,
        "dry_multiplier": 0.8,
        "dry_base": 2,
        "dry_allowed_length": 4,
        "dry_range": 50,
        "dry_sequence_breaker_ids": [13],
        "xtc_threshold": 0.2,
        "xtc_probability": 0.5,
    }
    penalties = {"presence_penalty": -0.5, "frequency_penalty": 0.25}
    client.completions.create(
        model="tiny", prompt="abc", temperature=0, n=2, best_of=3, logit_bias={"7": -100}, **penalties, extra_body=extra
    )
    first = world.tiny.requests[-1].sampling
    client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "abc"}],
        temperature=0,
        n=2,
        logit_bias={"7": -100},
        **penalties,
        extra_body=extra | {"best_of": 3},
    )
    for sampling in (first, world.tiny.requests[-1].sampling):
        assert (sampling.n, sampling.best_of, sampling.logit_bias) == (2, 3, {7: -100.0})
        for name, value in (penalties | extra).items():
            assert getattr(sampling, name) == (tuple(value) if isinstance(value, list) else value)


def test_encoder_side_parameters_and_names_of_transformers_reach_the_engine(
    world: World, client: openai.OpenAI
) -> None:
    extra = {
        "encoder_repetition_penalty": 1.5,
        "encoder_no_repeat_ngram_size": 3,
        "suppress_tokens": [4, 5],
        "begin_suppress_tokens": [6],
        "forced_bos_token_id": 0,
    }
    lengths = {"max_new_tokens": 9, "min_new_tokens": 2}
    client.completions.create(model="org/translator", prompt="abc", extra_body=extra | lengths)
    first = world.translator.requests[-1].sampling
    client.chat.completions.create(
        model="org/translator", messages=[{"role": "user", "content": "abc"}], extra_body=extra | lengths
    )
    for sampling in (first, world.translator.requests[-1].sampling):
        assert (sampling.max_tokens, sampling.min_tokens) == (9, 2)
        for name, value in extra.items():
            assert getattr(sampling, name) == (tuple(value) if isinstance(value, list) else value)


def test_defaults_are_sixteen_tokens_and_a_drawn_seed(world: World, client: openai.OpenAI) -> None:
    for _ in range(2):
        client.completions.create(model="tiny", prompt="abc")
    first, second = (request.sampling for request in world.tiny.requests[-2:])
    assert first.max_tokens == 16
    assert first.seed is not None and second.seed is not None and first.seed != second.seed


def test_default_max_tokens_is_cut_to_the_room_left(world: World, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt=[1] * (MAX_MODEL_LEN - 3))
    assert world.tiny.requests[-1].sampling.max_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "num_prompts"), [([1, 2, 3], 1), (["ab", "c"], 2), ([[1, 2], [3]], 2), ([[1, 2, 3]], 1)]
)
def test_every_prompt_form_is_taken(
    world: World, client: openai.OpenAI, prompt: list[int] | list[str], num_prompts: int
) -> None:
    completion = client.completions.create(model="tiny", prompt=prompt)
    assert len(completion.choices) == num_prompts
    assert completion.usage is not None and completion.usage.prompt_tokens == 3
    requests = world.tiny.requests[-num_prompts:]
    assert len({request.request_id for request in requests}) == num_prompts


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(
    world: World, client: openai.OpenAI, stream: bool
) -> None:
    for prompt in ("first", "second"):
        world.tiny.scripts[prompt] = [*deltas(prompt, "-b", index=1), *deltas(prompt, "-a", index=0)]
    if stream:
        texts = ["", "", "", ""]
        for chunk in client.completions.create(model="tiny", prompt=["first", "second"], n=2, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        completion = client.completions.create(model="tiny", prompt=["first", "second"], n=2)
        assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
        texts = [choice.text for choice in completion.choices]
    assert texts == ["first-a", "first-b", "second-a", "second-b"]


def test_stream_gives_deltas_then_finish_reason_then_usage(world: World, client: openai.OpenAI) -> None:
    world.tiny.scripts["limited"] = [
        ChoiceDelta(0, (65,), "a"),
        ChoiceDelta(0, (66,), ""),  # half a character: nothing to tell yet
        ChoiceDelta(0, (67,), "é", LENGTH),
    ]
    stream = client.completions.create(
        model="tiny", prompt="limited", stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [
        ("a", None),
        ("é", "length"),
    ]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None and last.usage.completion_tokens == 3 and last.usage.prompt_tokens == 7
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_stream_has_no_usage_unless_asked(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="tiny", prompt="abc", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello world"
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_reason_names_what_matched(world: World, client: openai.OpenAI, stream: bool) -> None:
    world.tiny.scripts["stops"] = deltas("a", "b", finish=STOP, stop_reason="\n\n")
    response = client.completions.create(model="tiny", prompt="stops", stop="\n\n", stream=stream)
    last = response if isinstance(response, openai.types.Completion) else list(response)[-1]
    assert last.choices[0].finish_reason == "stop"
    assert last.choices[0].model_extra is not None and last.choices[0].model_extra["stop_reason"] == "\n\n"


def test_text_round_trips_through_both_forms(world: World, client: openai.OpenAI) -> None:
    text = 'quote " backslash \\ newline \n nul \0 delete \x7f line separator \u2028 emoji \U0001f600 ü'
    world.tiny.scripts[text] = deltas(text[:20], text[20:])
    assert client.completions.create(model="tiny", prompt=text).choices[0].text == text
    chunks = client.completions.create(model="tiny", prompt=text, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_plain_prompt_of_an_encoder_decoder_model_is_the_encoder_input(world: World, client: openai.OpenAI) -> None:
    completion = client.completions.create(model="org/translator", prompt="abc")
    request = world.translator.requests[-1]
    assert request.prompt.encoder_token_ids == tuple(b"abc")
    assert request.prompt.token_ids == (DECODER_START,)
    assert request.sampling.max_tokens == 256
    assert completion.usage is not None and completion.usage.prompt_tokens == 4


@pytest.mark.parametrize(
    "body",
    [
        {"encoder_prompt": "abc", "decoder_prompt": "de"},
        {"encoder_prompt": list(b"abc"), "decoder_prompt": list(b"de")},
        {"encoder_prompt": "abc", "decoder_prompt": list(b"de")},
        {"prompt": "abc", "decoder_prompt": "de"},
    ],
)
def test_both_sides_of_an_encoder_decoder_prompt(world: World, client: openai.OpenAI, body: dict[str, object]) -> None:
    client.post("/completions", body={"model": "org/translator"} | body, cast_to=object)
    prompt = world.translator.requests[-1].prompt
    assert prompt.encoder_token_ids == tuple(b"abc")
    assert prompt.token_ids == (DECODER_START, *b"de")


def test_an_encoder_prompt_alone_has_an_empty_decoder_side(world: World, client: openai.OpenAI) -> None:
    client.post("/completions", body={"model": "org/translator", "encoder_prompt": "abc"}, cast_to=object)
    prompt = world.translator.requests[-1].prompt
    assert (prompt.encoder_token_ids, prompt.token_ids) == (tuple(b"abc"), (DECODER_START,))


@pytest.mark.parametrize("name", ["prompt", "encoder_prompt"])
@pytest.mark.parametrize(
    ("encoders", "decoders"),
    [(["a", "b"], ["de", "fg"]), (["a", "b"], [[1, 2], [3]]), ([[97], [98]], ["de", "fg"]), (["a"], ["de"])],
)
def test_each_encoder_input_has_its_decoder_prompt(
    world: World, client: openai.OpenAI, name: str, encoders: list[object], decoders: list[object]
) -> None:
    body = {"model": "org/translator", name: encoders, "decoder_prompt": decoders}
    client.post("/completions", body=body, cast_to=object)
    prompts = [request.prompt for request in world.translator.requests[-len(encoders) :]]
    found = {prompt.encoder_token_ids: prompt.token_ids for prompt in prompts}
    assert found == {
        as_ids(encoder): (DECODER_START, *as_ids(decoder)) for encoder, decoder in zip(encoders, decoders, strict=True)
    }


def as_ids(side: object) -> tuple[int, ...]:
    return tuple(side.encode() if isinstance(side, str) else side)  # type: ignore[call-overload]


@pytest.mark.parametrize("path", ["/completions", "/chat/completions"])
def test_the_target_language_is_forced_as_the_first_token(world: World, client: openai.OpenAI, path: str) -> None:
    body = {"model": "org/translator", "target_language": "fr", "source_language": "de"}
    text = {"prompt": "abc"} if path == "/completions" else {"messages": [{"role": "user", "content": "abc"}]}
    client.post(path, body=body | text, cast_to=object)
    request = world.translator.requests[-1]
    assert request.prompt.token_ids == (DECODER_START,) and request.sampling.forced_bos_token_id == 257


def test_one_decoder_prompt_serves_several_encoder_inputs(world: World, client: openai.OpenAI) -> None:
    client.completions.create(model="org/translator", prompt=["a", "b"], extra_body={"decoder_prompt": "de"})
    prompts = [request.prompt for request in world.translator.requests[-2:]]
    assert sorted(prompt.encoder_text or "" for prompt in prompts) == ["a", "b"]
    assert all(prompt.token_ids == (DECODER_START, *b"de") for prompt in prompts)


@pytest.mark.asyncio
async def test_async_client_completes_and_streams(world: World) -> None:
    async with openai.AsyncOpenAI(base_url=world.server.base_url, api_key="none", max_retries=0) as client:
        completion = await client.completions.create(model="tiny", prompt="abc")
        assert completion.choices[0].text == "Hello world"
        stream = await client.completions.create(model="tiny", prompt="abc", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello world"
