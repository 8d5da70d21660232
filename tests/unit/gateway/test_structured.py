"""What the output must be, in the fields of OpenAI and vLLM: what reaches the engine, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from trivium import StructuredOutputsParams
from unit.gateway.fakes import World, post

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}


def body(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    prompt = {"prompt": "a"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    return {"model": "tiny"} | prompt | fields


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA} | fields}}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}, "structured_outputs": None, "guided_json_object": False}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
        (json_schema(), StructuredOutputsParams(json=SCHEMA)),
        (json_schema(strict=True, description="d"), StructuredOutputsParams(json=SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutputsParams(regex="a+")),
        ({"structured_outputs": {"choice": ["x", "y"]}}, StructuredOutputsParams(choice=["x", "y"])),
        (
            {"structured_outputs": {"grammar": 'start: "a"', "backend": None}},
            StructuredOutputsParams(grammar='start: "a"'),
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
        ),
        ({"guided_json": SCHEMA}, StructuredOutputsParams(json=SCHEMA)),
        (
            {"guided_json": '{"type":"null"}', "guided_whitespace_pattern": " "},
            StructuredOutputsParams(json={"type": "null"}, whitespace_pattern=" "),
        ),
        ({"guided_regex": "a"}, StructuredOutputsParams(regex="a")),
        ({"guided_choice": ["a"]}, StructuredOutputsParams(choice=["a"])),
        ({"guided_grammar": "g"}, StructuredOutputsParams(grammar="g")),
        ({"guided_json_object": True}, StructuredOutputsParams(json_object=True)),
    ],
    ids=lambda value: f"{value!s:.60}",
)
def test_every_name_reaches_the_engine(
    world: World, path: str, fields: dict[str, Any], expected: StructuredOutputsParams | None
) -> None:
    assert post(world.port, path, body(path, fields)).status == 200
    assert world.tiny.requests[-1].sampling.structured_outputs == expected


CONFLICT = "conflicting_parameters"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"response_format": "json"}, "invalid_type", "response_format"),
        ({"response_format": {}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "invalid_schema", "response_format.json_schema"),
        (json_schema(name=None), "invalid_schema", "response_format.json_schema.name"),
        (json_schema(name="n" * 65), "invalid_schema", "response_format.json_schema.name"),
        (json_schema(schema=None), "invalid_schema", "response_format.json_schema.schema"),
        (json_schema(schema=[]), "invalid_schema", "response_format.json_schema.schema"),
        (json_schema(strict="yes"), "invalid_schema", "response_format.json_schema.strict"),
        (json_schema(description=5), "invalid_schema", "response_format.json_schema.description"),
        (json_schema(odd=5), "unsupported_parameter", "response_format.json_schema.odd"),
        (json_schema(schema={"a": "x" * 2**17}), "too_long", "response_format.json_schema.schema"),
        ({"structured_outputs": "a"}, "invalid_type", "structured_outputs"),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, CONFLICT, "structured_outputs"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "unsupported_parameter",
            "structured_outputs.structural_tag",
        ),
        ({"structured_outputs": {"regex": 5}}, "invalid_grammar", "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "("}}, "invalid_grammar", "structured_outputs.regex"),
        ({"guided_regex": "("}, "invalid_grammar", "guided_regex"),
        ({"guided_regex": ["a"]}, "invalid_grammar", "guided_regex"),
        ({"guided_choice": []}, "invalid_grammar", "guided_choice"),
        ({"guided_choice": "yes"}, "invalid_grammar", "guided_choice"),
        ({"guided_json": "{"}, "invalid_grammar", "guided_json"),
        ({"guided_json": 0}, "invalid_grammar", "guided_json"),
        ({"guided_grammar": ""}, "invalid_grammar", "guided_grammar"),
        ({"guided_json_object": 1}, "invalid_grammar", "guided_json_object"),
        ({"guided_whitespace_pattern": " "}, "invalid_value", "guided_whitespace_pattern"),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "invalid_value", "guided_whitespace_pattern"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, CONFLICT, "guided_choice"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, CONFLICT, "guided_regex"),
        (json_schema() | {"structured_outputs": {"regex": "a"}}, CONFLICT, "structured_outputs"),
        ({"guided_regex": "a", "allowed_token_ids": [5]}, CONFLICT, "allowed_token_ids"),
    ],
    ids=lambda value: f"{value!s:.60}",
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_is_wrong_is_named_as_the_client_named_it(
    world: World, path: str, fields: dict[str, Any], code: str, param: str
) -> None:
    answer = post(world.port, path, body(path, fields))
    assert answer.error == (400, code, param)


def test_the_message_speaks_of_the_field_that_was_sent(world: World) -> None:
    answer = post(world.port, COMPLETIONS, body(COMPLETIONS, {"guided_regex": "("}))
    assert b"guided_regex: wrong" in answer.body
    assert b"structured_outputs" not in answer.body
