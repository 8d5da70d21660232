"""`usage.prompt_tokens_details`: what the engine told of each prompt, once, whatever the number of choices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import openai
import pytest

from trivium.outputs import ChoiceDelta
from unit.gateway.fakes import HELLO, Step, World, deltas

USAGE: dict[str, Any] = {"include_usage": True}
COUNTED: dict[str, Any] = {"include_usage": True, "continuous_usage_stats": True}


def script(num_cached: int, n: int) -> list[Step]:
    """What an engine says of a request with `n` choices, choice 0 last."""
    steps = [step for index in reversed(range(n)) for step in deltas(*HELLO, index=index)]
    first = next(step for step in steps if isinstance(step, ChoiceDelta) and step.index == 0)
    steps[steps.index(first)] = replace(first, num_cached_tokens=num_cached)
    return steps


@pytest.fixture(autouse=True)
def scripts(world: World) -> None:
    for n in (1, 2):
        world.tiny.scripts |= {f"first{n}": script(32, n), f"second{n}": script(16, n)}


def details(usage: Any) -> int:
    return usage.prompt_tokens_details.cached_tokens  # type: ignore[no-any-return]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("prompts", "expected"), [(["first"], 32), (["first", "second"], 48), (["unknown"], 0)])
def test_completions_add_up_their_prompts(client: openai.OpenAI, n: int, prompts: Sequence[str], expected: int) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": [f"{prompt}{n}" for prompt in prompts], "n": n}
    whole = client.completions.create(**asked)
    assert details(whole.usage) == expected
    *chunks, last = client.completions.create(**asked, stream=True, stream_options=USAGE)
    assert last.usage == whole.usage and all(chunk.usage is None for chunk in chunks)
    *chunks, last = client.completions.create(**asked, stream=True, stream_options=COUNTED)
    counts = [details(chunk.usage) for chunk in chunks]
    assert last.usage == whole.usage and counts == sorted(counts) and counts[-1] == expected


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("fields", [{}, {"extra_body": {"return_token_ids": True}}])
def test_chats_count_their_prompt_once(client: openai.OpenAI, n: int, fields: dict[str, Any]) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": f"first{n}"}], "n": n, **fields}
    whole = client.chat.completions.create(**asked)
    assert details(whole.usage) == 32
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options=USAGE)
    assert last.usage == whole.usage and all(chunk.usage is None for chunk in chunks)
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options=COUNTED)
    assert last.usage == whole.usage
    assert [details(chunk.usage) for chunk in chunks] == [0] * 4 * (n - 1) + [32] * 4, "the event of the role, too"


def test_embeddings_have_no_details(client: openai.OpenAI) -> None:
    usage = json.loads(client.embeddings.with_raw_response.create(model="tiny", input="a").text)["usage"]
    assert usage.keys() == {"prompt_tokens", "total_tokens"}
