"""Tool calls over HTTP, as the openai client sees them: by parser, required, by name, streamed and not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import openai
import pytest

from trivium.config import TOOL_CALL_PARSERS
from trivium.outputs import ChoiceDelta, FinishReason
from trivium_gateway.tool_calls import READINGS
from trivium_gateway.tools import tool_use
from unit.gateway.fakes import STOP, FakeEngine, RunningServer, Step, make_info

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "v": {"type": "integer"}}, "required": ["v"]}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "time"}},
    {
        "type": "function",
        "function": {"name": "walk", "parameters": {"$ref": "#/$defs/node", "$defs": {"node": NODE}}},
    },
]
HERMES = 'Let me see.<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TWO = HERMES + '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
MODELS = ("hermes", "llama3_json", "mistral", "pythonic", "plain")


class World:
    def __init__(self) -> None:
        self.engines = {name: FakeEngine(make_info(name)) for name in MODELS}
        parsers = {name: name for name in MODELS if name != "plain"}
        self.server = RunningServer(self.engines, tool_parsers=parsers)
        self.client = openai.OpenAI(base_url=self.server.base_url, api_key="none", max_retries=0, timeout=20)

    def say(self, model: str, text: str, *, size: int = 5, finish: FinishReason = STOP) -> None:
        """`model` answers "go" with `text`, in pieces of `size` characters."""
        pieces = [text[start : start + size] for start in range(0, len(text), size)] or [""]
        steps: list[Step] = [ChoiceDelta(0, (65,), piece) for piece in pieces[:-1]]
        self.engines[model].scripts["go"] = [*steps, ChoiceDelta(0, (65,), pieces[-1], finish)]

    def ask(self, model: str, **fields: Any) -> Any:
        messages: Any = [{"role": "user", "content": "go"}]
        return self.client.chat.completions.create(model=model, messages=messages, **{"tools": TOOLS, **fields})


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    yield world
    world.client.close()
    world.server.stop()


Found = tuple[str | None, list[tuple[str, str]], str | None]


def whole(answer: Any) -> Found:
    (choice,) = answer.choices
    calls = choice.message.tool_calls or []
    assert all(call.type == "function" and call.id for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    found = [(call.function.name, call.function.arguments) for call in calls]
    return choice.message.content, found, choice.finish_reason


def streamed(chunks: Sequence[Any]) -> Found:
    """What a client makes of a stream, as OpenAI's documentation says to."""
    content, calls, finish = "", list[dict[str, str]](), None
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for piece in choice.delta.tool_calls or []:
                if piece.index == len(calls):
                    assert piece.id and piece.type == "function" and piece.function.name
                    calls.append({"name": piece.function.name, "arguments": ""})
                else:
                    assert piece.id is None and piece.function.name is None and piece.index == len(calls) - 1
                calls[piece.index]["arguments"] += piece.function.arguments
            finish = choice.finish_reason or finish
    return content or (None if calls else ""), [(call["name"], call["arguments"]) for call in calls], finish


CASES: list[tuple[str, str, Found]] = [
    ("hermes", HERMES, ("Let me see.", [("weather", '{"city": "Köln"}')], "tool_calls")),
    ("hermes", TWO, ("Let me see.", [("weather", '{"city": "Köln"}'), ("time", "{}")], "tool_calls")),
    ("hermes", "No call.", ("No call.", [], "stop")),
    ("hermes", "", ("", [], "stop")),
    ("llama3_json", '{"name": "time", "parameters": {}}', (None, [("time", "{}")], "tool_calls")),
    ("llama3_json", '{"name": "Bob"}', ('{"name": "Bob"}', [], "stop")),
    ("mistral", '[TOOL_CALLS][{"name": "time", "arguments": {}}]', (None, [("time", "{}")], "tool_calls")),
    ("pythonic", "[weather(city='Köln')]", (None, [("weather", '{"city": "Köln"}')], "tool_calls")),
    ("plain", HERMES, (HERMES, [], "stop")),
]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(("model", "text", "expected"), CASES)
def test_calls_are_read_streamed_and_not(world: World, model: str, text: str, expected: Found, size: int) -> None:
    world.say(model, text, size=size)
    assert whole(world.ask(model)) == expected
    assert streamed(list(world.ask(model, stream=True))) == expected
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(world.ask(model, stream=True, stream_options=options, extra_body={"return_token_ids": True}))
    assert streamed(chunks) == expected
    assert sum(len(getattr(choice, "token_ids", [])) for chunk in chunks for choice in chunk.choices) == (
        chunks[-1].usage.completion_tokens
    )


def test_an_answer_that_was_cut_says_so_and_has_what_there_is(world: World) -> None:
    world.say("hermes", HERMES[:60], finish=FinishReason.LENGTH)
    expected = ("Let me see.", [("weather", '{"ci')], "length")
    assert whole(world.ask("hermes")) == expected == streamed(list(world.ask("hermes", stream=True)))


def test_one_call_at_a_time(world: World) -> None:
    world.say("hermes", TWO)
    for stream in (False, True):
        answer = world.ask("hermes", parallel_tool_calls=False, stream=stream)
        found = streamed(list(answer)) if stream else whole(answer)
        assert found[1] == [("weather", '{"city": "Köln"}')]
    with pytest.raises(openai.BadRequestError) as caught:
        world.ask("plain", parallel_tool_calls=False)
    assert caught.value.param == "parallel_tool_calls"


def test_ids_of_mistral_are_those_that_its_template_takes(world: World) -> None:
    world.say("mistral", '[TOOL_CALLS][{"name": "time", "arguments": {}}]')
    (call,) = world.ask("mistral").choices[0].message.tool_calls
    assert len(call.id) == 9 and call.id.isalnum()


@pytest.mark.parametrize(
    ("model", "skips"), [("hermes", False), ("mistral", False), ("llama3_json", True), ("plain", True)]
)
def test_marks_that_may_be_special_tokens_are_asked_for(world: World, model: str, skips: bool) -> None:
    world.say(model, "x")
    world.ask(model)
    assert world.engines[model].requests[-1].sampling.skip_special_tokens is skips
    world.ask(model, tools=openai.NOT_GIVEN)
    assert world.engines[model].requests[-1].sampling.skip_special_tokens is True


def test_tools_that_may_not_be_called_are_not_shown_and_not_read(world: World) -> None:
    world.say("hermes", HERMES)
    assert whole(world.ask("hermes", tool_choice="none")) == (HERMES, [], "stop")
    assert world.engines["hermes"].template_inputs[-1][0] is None


def grammar_of(world: World, model: str) -> Any:
    params = world.engines[model].requests[-1].sampling.structured_outputs
    assert params is not None
    return params.json if isinstance(params.json, dict) else json.loads(str(params.json))


@pytest.mark.parametrize("model", ["plain", "hermes"])
def test_a_named_function_is_called_with_what_its_schema_allows(world: World, model: str) -> None:
    world.say(model, '{"city": "Köln"}', size=3)
    for name, schema in (("weather", TOOLS[0]["function"]["parameters"]), ("time", {"type": "object"})):
        choice = {"type": "function", "function": {"name": name}}
        expected = (None, [(name, '{"city": "Köln"}')], "stop")  # as OpenAI has it: the model did not decide to call
        assert whole(world.ask(model, tool_choice=choice)) == expected
        assert grammar_of(world, model) == schema
        assert streamed(list(world.ask(model, tool_choice=choice, stream=True))) == expected
        assert world.engines[model].template_inputs[-1][0] == TOOLS


@pytest.mark.parametrize("model", ["plain", "hermes"])
def test_a_call_that_is_required_is_one_of_the_tools(world: World, model: str) -> None:
    calls = [
        {"name": "weather", "parameters": {"city": "x"}},
        {"name": "walk", "parameters": {"v": 1, "next": {"v": 2}}},
    ]
    world.say(model, json.dumps(calls), size=4)
    expected = (None, [(call["name"], json.dumps(call["parameters"])) for call in calls], "tool_calls")
    assert whole(world.ask(model, tool_choice="required")) == expected
    schema = grammar_of(world, model)
    jsonschema.validate(calls, schema)
    wrong: list[Any] = [[], {}, [{"name": "other", "parameters": {}}], [{"name": "weather", "parameters": {}}]]
    wrong += [[{"name": "walk", "parameters": {"v": "x"}}], [{"name": "walk", "parameters": {"v": 1, "next": {}}}]]
    for value in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, schema)
    assert streamed(list(world.ask(model, tool_choice="required", stream=True))) == expected
    world.ask(model, tool_choice="required", parallel_tool_calls=False)
    assert grammar_of(world, model)["maxItems"] == 1


def test_every_parser_of_the_command_line_is_there() -> None:
    assert set(READINGS) == set(TOOL_CALL_PARSERS)


def test_references_that_are_no_references_stay() -> None:
    from trivium_gateway.openai_protocol import ChatCompletionRequest

    properties = {"$ref": {"type": "string"}, "a": {"enum": ["#"]}, "b": {"$ref": "https://x/#y"}, "c": {"$ref": "#"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    use = tool_use(ChatCompletionRequest(tools=[tool], tool_choice="required"), None)
    assert use.grammar is not None
    moved = json.loads(str(use.grammar.json))["$defs"]["tool0"]["properties"]
    assert moved == {**properties, "c": {"$ref": "#/$defs/tool0"}}
