"""POST /v1/embeddings, seen by the unmodified OpenAI client and by plain HTTP."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from unit.gateway.fakes import VOCAB_SIZE, World, post

PATH = "/v1/embeddings"


def test_the_client_reads_one_vector_per_input(client: openai.OpenAI) -> None:
    """It asks for base64 by itself."""
    answer = client.embeddings.create(model="tiny", input=["ab", "c"])
    assert [item.embedding for item in answer.data] == [[2.0, 195.0, 1.0], [1.0, 99.0, 1.0]]
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)
    numbers = client.embeddings.create(model="tiny", input="ab", encoding_format="float")
    assert numbers.data[0].embedding == [2.0, 195.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "vectors"),
    [
        ({"input": [97, 98]}, [[2, 195, 1]]),
        ({"input": [[97], [98, 98]]}, [[1, 97, 1], [2, 196, 1]]),
        ({"input": "ab", "normalize": False}, [[2, 195, 0]]),
        ({"input": "abcd", "truncate_prompt_tokens": 1}, [[1, 100, 1]]),
        ({"input": "a", "dimensions": None, "user": "me", "pooling_type": "mean"}, [[1, 97, 1]]),
        ({"input": "abcd", "model": "org/translator", "truncate_prompt_tokens": 1}, [[1, 97, 1]]),
    ],
)
def test_inputs_and_options(world: World, fields: dict[str, Any], vectors: list[list[float]]) -> None:
    answer = post(world.port, PATH, {"model": "tiny"} | fields)
    assert answer.status == 200
    assert [item["embedding"] for item in answer.json["data"]] == vectors


def test_many_inputs_are_sent_in_packs_that_fit_one_pass(world: World) -> None:
    world.tiny.packs.clear()
    answer = post(world.port, PATH, {"model": "tiny", "input": ["a" * 100] * 5 + ["b" * 300]})
    assert [len(pack) for pack in world.tiny.packs] == [2, 2, 1, 1]
    assert [item["embedding"][0] for item in answer.json["data"]] == [100] * 5 + [300]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, (400, "missing_input", "input")),
        ({"input": "a", "model": None}, (400, "missing_model", "model")),
        ({"input": "a", "model": "nobody"}, (404, "model_not_found", "model")),
        ({"input": []}, (400, "invalid_prompt", "input")),
        ({"input": ["a", 5]}, (400, "invalid_prompt", "input[1]")),
        ({"input": [VOCAB_SIZE]}, (400, "invalid_token_id", "input[0]")),
        ({"input": ["a", "b" * 1001]}, (400, "context_length_exceeded", "input[1]")),
        ({"input": ["a"] * 2049}, (400, "too_many_prompts", "input")),
        ({"input": "a", "dimensions": 8}, (400, "unsupported_parameter", "dimensions")),
        ({"input": "a", "encoding_format": "int8"}, (400, "invalid_type", "encoding_format")),
        ({"input": "a", "pooling_type": "all"}, (400, "invalid_value", "pooling_type")),
        ({"input": "a", "pooling_type": "max"}, (400, "invalid_value", "pooling_type")),
        ({"input": "a", "truncate_prompt_tokens": 0}, (400, "invalid_value", "truncate_prompt_tokens")),
    ],
    ids=lambda value: f"{value!s:.50}",
)
def test_bad_requests(world: World, fields: dict[str, Any], error: tuple[int, str, str]) -> None:
    assert post(world.port, PATH, {"model": "tiny"} | fields).error == error
