"""Tool calls through real processes and the openai client: read out of a text, and held to by a grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from cluster import Cluster, serve
from tiny import save_tiny

pytestmark = pytest.mark.xdist_group("details")

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.name }}:{{ c.function.arguments.city }}){% endfor %}{% endfor %}<a>"
)
CITY: Any = {"type": "object", "properties": {"city": {"enum": ["Köln", "Bonn"]}}, "required": ["city"]}
PATH: Any = {
    "type": "object",
    "properties": {"steps": {"type": "array", "items": {"$ref": "#/$defs/step"}, "minItems": 1, "maxItems": 2}},
    "required": ["steps"],
    "additionalProperties": False,
    "$defs": {"step": {"enum": ["left", "right"]}},
}
SCHEMAS = {"weather": {**CITY, "additionalProperties": False}, "walk": PATH}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
USER: Any = {"role": "user", "content": "Is it warm?"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("tools")
    path = save_tiny("llama", folder / "chat", with_tokenizer=True, max_position_embeddings=2048)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with serve(f"chat={path}", *flags, log=folder / "serve.log") as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client: openai.OpenAI, *messages: Any, **fields: Any) -> Any:
    """The one choice: (content, [(name, arguments), ...], finish reason), of a call and of a stream alike."""
    settings: dict[str, Any] = {"tools": TOOLS, "max_tokens": 1000, "temperature": 1.0, "seed": 3, **fields}
    answer = client.chat.completions.create(model="chat", messages=[*(messages or [USER])], **settings)
    (choice,) = answer.choices
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    found = choice.message.content, calls, choice.finish_reason
    with client.chat.completions.stream(model="chat", messages=[*(messages or [USER])], **settings) as stream:
        (again,) = stream.get_final_completion().choices
    calls = [(call.function.name, call.function.arguments) for call in again.message.tool_calls or []]
    assert (again.message.content or None, calls, again.finish_reason) == (found[0] or None, *found[1:])
    return found


def test_calls_are_read_out_of_a_text(client: openai.OpenAI) -> None:
    text = {"structured_outputs": {"choice": [f"Let me see.{CALL}"]}}
    assert ask(client, extra_body=text) == ("Let me see.", [("weather", '{"city": "Köln"}')], "tool_calls")
    answer = client.chat.completions.create(model="chat", messages=[USER], max_tokens=99, extra_body=text)
    assert answer.choices[0].message.content == f"Let me see.{CALL}" and answer.choices[0].finish_reason == "stop"


def test_a_conversation_goes_on_after_a_call(cluster: Cluster, client: openai.OpenAI) -> None:
    text = {"structured_outputs": {"choice": [CALL]}}
    message = (
        client.chat.completions.create(model="chat", messages=[USER], tools=TOOLS, max_tokens=200, extra_body=text)
        .choices[0]
        .message
    )
    (call,) = message.tool_calls or []
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "25"}
    given = message.model_dump(exclude_none=True)
    answer = client.chat.completions.create(
        model="chat",
        messages=[USER, given, result],
        tools=TOOLS,
        max_tokens=4,
        extra_body={"return_token_ids": True},  # type: ignore[list-item]
    )
    ids: Any = answer.prompt_token_ids  # type: ignore[attr-defined]
    body = {"model": "chat", "tokens": ids}
    shown = client.post(cluster.url.replace("/v1", "/detokenize"), body=body, cast_to=object)
    assert shown == {"prompt": "[weather][walk]<user>Is it warm?<assistant>(weather:Köln)<tool>25<a>"}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_named_function_is_called(client: openai.OpenAI, name: str, temperature: float) -> None:
    choice = {"type": "function", "function": {"name": name}}
    content, calls, finish = ask(client, tool_choice=choice, temperature=temperature)
    assert (content, finish) == (None, "stop") and [call[0] for call in calls] == [name]
    jsonschema.validate(json.loads(calls[0][1]), SCHEMAS[name])


@pytest.mark.parametrize("seed", range(4))
def test_some_function_is_called_where_one_is_required(client: openai.OpenAI, seed: int) -> None:
    content, calls, finish = ask(client, tool_choice="required", parallel_tool_calls=False, seed=seed)
    assert (content, finish) == (None, "tool_calls") and len(calls) == 1
    jsonschema.validate(json.loads(calls[0][1]), SCHEMAS[calls[0][0]])


def test_a_schema_that_no_grammar_can_hold_is_a_400_by_name(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "frog"}}}
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="chat", messages=[USER], tools=[tool], tool_choice=choice)  # type: ignore[arg-type]
        assert caught.value.param == "tools"
