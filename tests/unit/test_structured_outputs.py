"""`StructuredOutputsParams`: one kind, bounded, in one form; and what it may not be combined with."""

import json

import pytest

from trivium import BeamSearchParams, SamplingParams, StructuredOutputsParams
from trivium.errors import InvalidRequestError
from trivium.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_CHARS, MAX_SCHEMA_DEPTH


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "structured_outputs"),
        ({"json_object": False}, "structured_outputs"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs"),
        ({"json": "{"}, "structured_outputs.json"),
        ({"json": "[]"}, "structured_outputs.json"),
        ({"json": {"minimum": float("nan")}}, "structured_outputs.json"),
        ({"json": {"const": {1, 2}}}, "structured_outputs.json"),
        ({"json": nested(MAX_SCHEMA_DEPTH)}, "structured_outputs.json"),
        ({"json": {"const": "\ud800"}}, "structured_outputs.json"),
        ({"json": {"const": "x" * MAX_GRAMMAR_CHARS}}, "structured_outputs.json"),
        ({"regex": ""}, "structured_outputs.regex"),
        ({"regex": 5}, "structured_outputs.regex"),
        ({"regex": "x" * (MAX_GRAMMAR_CHARS + 1)}, "structured_outputs.regex"),
        ({"grammar": "\ud800"}, "structured_outputs.grammar"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": "yes"}, "structured_outputs.choice"),
        ({"choice": ["a", ""]}, "structured_outputs.choice"),
        ({"choice": ["a", 1]}, "structured_outputs.choice"),
        ({"choice": [str(i) for i in range(MAX_CHOICES + 1)]}, "structured_outputs.choice"),
        ({"json_object": 1}, "structured_outputs.json_object"),
        ({"regex": "a", "disable_any_whitespace": True}, "structured_outputs.disable_any_whitespace"),
        ({"regex": "a", "whitespace_pattern": " "}, "structured_outputs.whitespace_pattern"),
        (
            {"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "},
            "structured_outputs.whitespace_pattern",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        StructuredOutputsParams(**fields)  # type: ignore[arg-type]
    assert caught.value.param == param
    assert param in caught.value.message


def test_a_schema_has_one_form_whether_text_or_object_and_keeps_the_order_of_its_properties() -> None:
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    params = StructuredOutputsParams(json=schema)
    assert params == StructuredOutputsParams(json=json.dumps(schema, indent=2))
    assert hash(params) == hash(StructuredOutputsParams(json=json.dumps(schema)))
    assert list(json.loads(str(params.json))["properties"]) == ["z", "a"]


@pytest.mark.parametrize("value", [{"regex": "a"}, "a", 5])
def test_sampling_params_take_nothing_but_structured_outputs_params(value: object) -> None:
    with pytest.raises(InvalidRequestError, match="structured_outputs must be"):
        SamplingParams(structured_outputs=value)  # type: ignore[arg-type]


def test_allowed_token_ids_cannot_be_combined_with_a_grammar() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), allowed_token_ids=(5,))
    assert caught.value.param == "allowed_token_ids"


def test_a_beam_search_takes_them_too() -> None:
    structured = StructuredOutputsParams(choice=["a", "b", "a"])
    params = BeamSearchParams(beam_width=2, max_tokens=4, structured_outputs=structured)
    assert params.to_sampling_params().structured_outputs == StructuredOutputsParams(choice=("a", "b"))
