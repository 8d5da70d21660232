"""Two hundred random JSON schemas: every output of random models validates, however it is chosen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import date
from itertools import count
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from schemas import Schema, keywords, make_schema
from tiny import save_tiny
from trivium import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams, TokensPrompt

NUM_SCHEMAS = 200
MAX_TOKENS = 3000  # far more than any output has: one that is cut is an error
FAMILIES = ("llama", "bart", "t5_gated")
KEYWORDS = {
    "type", "const", "enum", "anyOf", "allOf", "$ref", "$defs",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "minLength", "maxLength", "pattern", "format",
    "items", "prefixItems", "minItems", "maxItems", "properties", "required", "additionalProperties",
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path, max_len = tmp_path_factory.mktemp("tiny") / request.param, MAX_TOKENS + 10
    positions = {} if request.param == "t5_gated" else {"max_position_embeddings": max_len}
    save_tiny(request.param, path, with_tokenizer=True, **positions)
    with LLM(str(path), served_model_name=request.param, max_model_len=max_len) as llm:
        yield llm


def params_for(seed: int, schema: Schema) -> SamplingParams | BeamSearchParams:
    """Greedy, sampled in several ways, or with beams; the white space is free in a seventh of all."""
    structured = StructuredOutputsParams(json=schema, disable_any_whitespace=seed % 7 != 0)
    limits: dict[str, Any] = {"max_tokens": MAX_TOKENS, "structured_outputs": structured}
    match seed % 5:
        case 0:
            return SamplingParams(temperature=0.0, **limits)
        case 1:
            return BeamSearchParams(beam_width=2, num_return_sequences=2, **limits)
        case 2:
            return SamplingParams(temperature=2.0, seed=seed, n=2, **limits)
        case 3:
            return SamplingParams(temperature=0.7, top_p=0.8, seed=seed, **limits)
    return SamplingParams(temperature=1.0, top_k=20, repetition_penalty=1.2, seed=seed, **limits)


def different_schemas() -> dict[int, Schema]:
    """seed -> schema, no two alike."""
    found: dict[str, int] = {}
    for seed in count():
        found.setdefault(json.dumps(make_schema(seed)), seed)
        if len(found) == NUM_SCHEMAS:
            return {seed: json.loads(text) for text, seed in found.items()}
    raise AssertionError("there is no last seed")


def is_date(text: object) -> bool:
    """As RFC 3339 has it, with a year 0, which Python's dates do not have and leap years do."""
    return not isinstance(text, str) or bool(date.fromisoformat(re.sub("^0000-", "0400-", text)))


FORMATS = FormatChecker(("ipv4", "ipv6", "uuid", "email"))
FORMATS.checks("date", ValueError)(is_date)


def problem(text: str, schema: Schema) -> str | None:
    """Why `text` is no instance of `schema`, None if it is one."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    validator = Draft202012Validator(schema, format_checker=FORMATS)
    return next((error.message for error in validator.iter_errors(value)), None)


def test_the_schemas_are_valid_and_use_every_keyword() -> None:
    schemas = different_schemas().values()
    for schema in schemas:
        Draft202012Validator.check_schema(schema)
    assert not KEYWORDS - set().union(*map(keywords, schemas))


def test_an_output_that_is_no_instance_would_be_found() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "date"}}, "required": ["a"]}
    assert problem('{"a": "0000-02-29"}', schema) is None
    for text in ("", '{"a": ', "[]", "{}", '{"a": 1}', '{"a": "2023-02-29"}'):
        assert problem(text, schema) is not None


def test_every_output_validates(llm: LLM) -> None:
    """Each family has its share of the schemas."""
    first = FAMILIES.index(llm.model_info.name)
    schemas = dict(list(different_schemas().items())[first :: len(FAMILIES)])
    params = [params_for(seed, schema) for seed, schema in schemas.items()]
    prompts = [TokensPrompt(prompt_token_ids=[40 + seed % 200, 50, 60]) for seed in schemas]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert len(outputs) >= NUM_SCHEMAS // len(FAMILIES)
    for (seed, schema), output in zip(schemas.items(), outputs, strict=True):
        for choice in output.outputs:
            assert choice.finish_reason == "stop", f"seed {seed} was cut: {schema} {choice.text[-200:]!r}"
            assert (found := problem(choice.text, schema)) is None, f"seed {seed}: {found}\n{schema}\n{choice.text!r}"
