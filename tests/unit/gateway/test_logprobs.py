"""Log-probabilities and echo in the shapes of OpenAI and vLLM, seen by the unmodified OpenAI client.

The tokens of the scripted engine are UTF-8 bytes, so that every character beyond ASCII is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai
import pytest

from trivium.outputs import ChoiceDelta, TokenLogprobs
from unit.gateway.fakes import DECODER_START, LENGTH, Step, World

EOS = 256  # a special token of the scripted engine


def value(logprob: float, *top_ids: int) -> TokenLogprobs:
    return TokenLogprobs(logprob, 1, top_ids, tuple(-0.25 - index for index in range(len(top_ids))))


def script(world: World, prompt: str, text: str = "né!", *, of_prompt: bool = False, n: int = 1) -> list[float]:
    """One delta per byte of `text`, and one for EOS. Token i has the log-probability -1 - i, position i of the prompt
    -10 - i; each names the token before it in the alphabet, then itself."""
    steps: list[Step] = []
    ids = [*text.encode(), EOS]
    cuts = [text.encode()[: index + 1].decode(errors="ignore") for index in range(len(ids))]
    for choice in range(n):
        for index, token_id in enumerate(ids):
            new_text = cuts[index][len(cuts[index - 1]) if index else 0 :]
            prompts = tuple(value(-10.0 - i, 98) for i in range(1, len(prompt.encode()))) if of_prompt else ()
            steps.append(
                ChoiceDelta(
                    choice,
                    (token_id,),
                    new_text,
                    LENGTH if index == len(ids) - 1 else None,
                    logprobs=(value(-1.0 - index, token_id - 1, token_id),),
                    prompt_logprobs=prompts if index == choice == 0 else (),
                )
            )
    world.tiny.scripts[prompt] = steps
    return [-1.0 - index for index in range(len(ids))]


def merged(chunks: Sequence[Any]) -> list[dict[str, Any]]:
    """The choices of a stream, put together as a client would."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk.choices:
            choice = choices.setdefault(part.index, {"text": "", "logprobs": {}})
            choice["text"] += part.text
            for name, column in (part.logprobs.model_dump() if part.logprobs else {}).items():
                choice["logprobs"].setdefault(name, []).extend(column)
    return [choices[index] for index in sorted(choices)]


def completions(client: openai.OpenAI, stream: bool, **fields: Any) -> list[dict[str, Any]]:
    response = client.completions.create(model="tiny", stream=stream, **fields)
    if stream:
        return merged(list(response))
    return [
        {"text": choice.text, "logprobs": choice.logprobs.model_dump() if choice.logprobs else {}}
        for choice in response.choices
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_completions_in_columns(world: World, client: openai.OpenAI, stream: bool) -> None:
    logprobs = script(world, "columns")
    (choice,) = completions(client, stream, prompt="columns", logprobs=2)
    assert world.tiny.requests[-1].sampling.logprobs == 2
    assert world.tiny.requests[-1].sampling.prompt_logprobs is None
    assert choice["text"] == "né!"
    columns = choice["logprobs"]
    assert columns["tokens"] == ["n", "bytes:\\xc3", "bytes:\\xa9", "!", "</s>"]
    assert columns["token_logprobs"] == logprobs
    assert columns["text_offset"] == [0, 1, 1, 2, 3]
    assert columns["top_logprobs"][0] == {"m": -0.25, "n": -1.25}
    assert columns["top_logprobs"][1] == {"bytes:\\xc2": -0.25, "bytes:\\xc3": -1.25}


@pytest.mark.parametrize("stream", [False, True])
def test_fewer_top_tokens_still_hold_the_token_itself(world: World, client: openai.OpenAI, stream: bool) -> None:
    world.tiny.scripts["itself"] = [ChoiceDelta(0, (65,), "A", LENGTH, logprobs=(value(-3.0, 66),))]
    (choice,) = completions(client, stream, prompt="itself", logprobs=1)
    assert choice["logprobs"]["top_logprobs"] == [{"B": -0.25, "A": -3.0}]
    world.tiny.scripts["none"] = [ChoiceDelta(0, (65,), "A", LENGTH, logprobs=(value(-3.0),))]
    (choice,) = completions(client, stream, prompt="none", logprobs=0)
    assert choice["logprobs"]["top_logprobs"] == [{"A": -3.0}]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_in_front(world: World, client: openai.OpenAI, stream: bool) -> None:
    script(world, "wä", n=2)
    choices = completions(client, stream, prompt="wä", echo=True, n=2)
    assert [choice["text"] for choice in choices] == ["wäné!", "wäné!"]
    assert all(not choice["logprobs"] for choice in choices)
    assert world.tiny.requests[-1].sampling.prompt_logprobs is None
    by_ids = completions(client, stream, prompt=list("wä".encode()), echo=True, n=2)
    assert by_ids == choices


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_reports_the_prompt_too(world: World, client: openai.OpenAI, stream: bool) -> None:
    logprobs = script(world, "wä", of_prompt=True, n=2)
    choices = completions(client, stream, prompt="wä", echo=True, logprobs=1, n=2)
    assert world.tiny.requests[-1].sampling.prompt_logprobs == 1
    for choice in choices:
        assert choice["text"] == "wäné!"
        columns = choice["logprobs"]
        assert columns["tokens"][:3] == ["w", "bytes:\\xc3", "bytes:\\xa4"]
        assert columns["token_logprobs"] == [None, -11.0, -12.0, *logprobs]
        assert columns["top_logprobs"][:2] == [None, {"b": -0.25, "bytes:\\xc3": -11.0}]
        assert columns["text_offset"] == [0, 1, 1, 2, 3, 3, 4, 5]


def test_echo_of_an_encoder_decoder_model_is_the_decoder_prompt(world: World, client: openai.OpenAI) -> None:
    world.translator.scripts["source"] = [ChoiceDelta(0, (33,), "!", LENGTH)]
    for decoder_prompt in ("de", list(b"de")):
        completion = client.completions.create(
            model="org/translator", prompt="source", echo=True, extra_body={"decoder_prompt": decoder_prompt}
        )
        assert completion.choices[0].text == "de!"
    assert world.translator.requests[-1].prompt.token_ids == (DECODER_START, *b"de")


def test_prompt_logprobs_of_completions_are_in_each_choice(world: World, client: openai.OpenAI) -> None:
    script(world, "abc", of_prompt=True, n=2)
    completion = client.completions.create(model="tiny", prompt="abc", n=2, extra_body={"prompt_logprobs": 1})
    for choice in completion.choices:
        assert choice.logprobs is None and choice.model_extra is not None
        assert choice.model_extra["prompt_logprobs"] == [
            None,
            {"98": {"logprob": -11.0, "rank": 1, "decoded_token": "b"}},
            {
                "99": {"logprob": -12.0, "rank": 1, "decoded_token": "c"},
                "98": {"logprob": -0.25, "rank": 1, "decoded_token": "b"},
            },
        ]
    plain = client.completions.create(model="tiny", prompt="abcd")
    assert plain.choices[0].model_extra is not None and "prompt_logprobs" not in plain.choices[0].model_extra


def test_prompt_logprobs_of_chat_are_beside_the_choices(world: World, client: openai.OpenAI) -> None:
    script(world, "ab", of_prompt=True)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "ab"}], extra_body={"prompt_logprobs": 0}
    )
    assert chat.model_extra is not None
    shown = {"98": {"logprob": -11.0, "rank": 1, "decoded_token": "b"}}
    assert chat.model_extra["prompt_logprobs"] == [None, shown]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_tells_the_bytes_of_each_token(world: World, client: openai.OpenAI, stream: bool) -> None:
    logprobs = script(world, "chat", n=2)
    response = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "chat"}],
        n=2,
        logprobs=True,
        top_logprobs=2,
        stream=stream,
    )
    contents: list[list[Any]] = [[], []]
    texts = ["", ""]
    if stream:
        for chunk in response:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                contents[choice.index] += choice.logprobs.content if choice.logprobs else []
    else:
        texts = [choice.message.content for choice in response.choices]
        contents = [choice.logprobs.content for choice in response.choices]
    assert world.tiny.requests[-1].sampling.logprobs == 2
    assert texts == ["né!", "né!"]
    for content in contents:
        assert [item.token for item in content] == ["n", "\ufffd", "\ufffd", "!", "</s>"]
        assert bytes(byte for item in content[:-1] for byte in item.bytes) == "né!".encode()
        assert [item.logprob for item in content] == logprobs
        assert [(top.token, top.logprob, top.bytes) for top in content[0].top_logprobs] == [
            ("m", -0.25, [109]),
            ("n", -1.25, [110]),
        ]


def test_chat_without_top_logprobs_reports_the_token_alone(world: World, client: openai.OpenAI) -> None:
    world.tiny.scripts["alone"] = [ChoiceDelta(0, (65,), "A", LENGTH, logprobs=(value(float("-inf")),))]
    messages: list[Any] = [{"role": "user", "content": "alone"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, logprobs=True)
    assert world.tiny.requests[-1].sampling.logprobs == 0
    (choice,) = chat.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    (item,) = choice.logprobs.content
    assert (item.token, item.logprob, item.bytes, item.top_logprobs) == ("A", -9999.0, [65], [])


def test_a_dropped_leading_space_moves_no_offset(world: World, client: openai.OpenAI) -> None:
    """Decoders of sentencepiece drop the space of the first piece."""
    steps = [
        ChoiceDelta(0, (32, 65), "A", logprobs=(value(-1.0), value(-1.0))),
        ChoiceDelta(0, (32, 66), " B", LENGTH, logprobs=(value(-1.0), value(-1.0))),
    ]
    world.tiny.scripts["space"] = steps
    for stream in (False, True):
        (choice,) = completions(client, stream, prompt="space", logprobs=0)
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]


def test_best_of_above_n_reaches_the_engine(world: World, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="abc", n=2, best_of=4)
    assert (world.tiny.requests[-1].sampling.n, world.tiny.requests[-1].sampling.best_of) == (2, 4)


def test_calls_without_logprobs_ask_for_no_tokens(
    world: World, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.tiny, "token_texts", None)
    for stream in (False, True):
        assert completions(client, stream, prompt="plain")[0] == {"text": "Hello world", "logprobs": {}}
