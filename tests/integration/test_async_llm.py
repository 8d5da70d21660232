"""`AsyncLLM` in the loop of a test: the outputs of `LLM`, as they grow, and requests that end early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from trivium import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TokensPrompt,
)
from trivium.errors import EngineUnavailableError, InvalidRequestError

PARAMS = SamplingParams(temperature=0, max_tokens=12, n=2, logprobs=1, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
CHAT = [{"role": "user", "content": "How many minutes are in 3 hours?"}]


@pytest.fixture(scope="module")
def whole(checkpoints: dict[str, Path]) -> RequestOutput:
    with LLM(str(checkpoints["llama"]), num_threads=1) as llm:
        return llm.generate("Hello", PARAMS, use_tqdm=False)[0]


@pytest_asyncio.fixture
async def llm(checkpoints: dict[str, Path]) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(str(checkpoints["llama"]), num_threads=1) as engine:
        yield engine


async def collect(llm: AsyncLLM, params: Any, request_id: str | None = None) -> list[RequestOutput]:
    return [output async for output in llm.generate("Hello", params, request_id)]


@pytest.mark.asyncio
async def test_cumulative_outputs_grow_to_the_whole(llm: AsyncLLM, whole: RequestOutput) -> None:
    outputs = await collect(llm, PARAMS)
    assert len(outputs) > 5 and outputs[-1].outputs == whole.outputs
    for before, after in pairwise(outputs):
        for old, new in zip(before.outputs, after.outputs, strict=True):
            assert new.text.startswith(old.text) and new.token_ids[: len(old.token_ids)] == old.token_ids
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


@pytest.mark.asyncio
async def test_deltas_add_up_to_the_whole(llm: AsyncLLM, whole: RequestOutput) -> None:
    outputs = await collect(llm, replace(PARAMS, output_kind=RequestOutputKind.DELTA))
    for index, choice in enumerate(whole.outputs):
        parts = [part for output in outputs for part in output.outputs if part.index == index]
        assert len(parts) > 2
        assert "".join(part.text for part in parts) == choice.text
        assert [token_id for part in parts for token_id in part.token_ids] == choice.token_ids
        assert [item for part in parts for item in part.logprobs or ()] == choice.logprobs
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


@pytest.mark.asyncio
async def test_final_only_is_the_whole_and_nothing_else(llm: AsyncLLM, whole: RequestOutput) -> None:
    (output,) = await collect(llm, replace(PARAMS, output_kind=RequestOutputKind.FINAL_ONLY))
    assert output.outputs == whole.outputs and output.finished
    assert output.num_cached_tokens == whole.num_cached_tokens == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", RequestOutputKind)
async def test_every_output_says_how_much_of_the_prompt_was_cached(llm: AsyncLLM, kind: RequestOutputKind) -> None:
    params = replace(PARAMS, output_kind=kind)
    for expected in (0, 32):
        outputs = [output async for output in llm.generate(TokensPrompt(prompt_token_ids=list(range(5, 45))), params)]
        assert {output.num_cached_tokens for output in outputs} == {expected}


@pytest.mark.asyncio
async def test_abort_ends_one_request_with_what_there_is(llm: AsyncLLM) -> None:
    async def run(request_id: str) -> RequestOutput:
        async for output in llm.generate("Hello", LONG, request_id):
            if request_id == "first" and not output.finished:
                assert await llm.abort("first") or output.outputs[0].token_ids
        return output

    first, second = await asyncio.gather(run("first"), run("second"))
    assert first.finished and first.outputs[0].finish_reason == "abort"
    assert 1 <= len(first.outputs[0].token_ids) < 100
    assert second.outputs[0].finish_reason == "length" and len(second.outputs[0].token_ids) == 100
    assert second.outputs[0].token_ids[: len(first.outputs[0].token_ids)] == first.outputs[0].token_ids
    assert not await llm.abort("first")


@pytest.mark.asyncio
async def test_a_closed_generator_frees_everything(llm: AsyncLLM) -> None:
    async with aclosing(llm.generate("Hello", LONG)) as outputs:
        async for _ in outputs:
            break
    while llm._engine.engine_loop.scheduler.num_held_blocks:
        await asyncio.sleep(0.01)
    assert (await collect(llm, PARAMS))[-1].finished


@pytest.mark.asyncio
async def test_an_id_is_of_one_running_request(llm: AsyncLLM) -> None:
    async with aclosing(llm.generate("Hello", LONG, "mine")) as outputs:
        await anext(outputs)
        with pytest.raises(InvalidRequestError, match="in use"):
            await collect(llm, PARAMS, "mine")
    assert (await collect(llm, PARAMS, "mine"))[-1].request_id == "mine"


@pytest.mark.asyncio
async def test_bad_parameters_come_before_any_output(llm: AsyncLLM) -> None:
    with pytest.raises(InvalidRequestError, match="context"):
        await collect(llm, SamplingParams(max_tokens=10_000))
    with pytest.raises(InvalidRequestError, match="scheduling policy"):
        [output async for output in llm.generate("Hello", priority=1)]


@pytest.mark.asyncio
async def test_beams_and_chats_stream_too(llm: AsyncLLM) -> None:
    beams = await collect(llm, BeamSearchParams(beam_width=3, max_tokens=8))
    assert beams[-1].finished
    async with AsyncLLM("trivium-chat", num_threads=1) as chat:
        texts = [
            output.outputs[0].text async for output in chat.chat(CHAT, SamplingParams(temperature=0, max_tokens=40))
        ]
    assert texts[-1] == "3 hours are 180 minutes." and len(texts) > 3


@pytest.mark.asyncio
async def test_the_first_call_loads_and_close_ends(checkpoints: dict[str, Path]) -> None:
    llm = AsyncLLM(str(checkpoints["llama"]), num_threads=1)
    with pytest.raises(EngineUnavailableError):
        _ = llm.model_info
    outputs = await asyncio.gather(*(collect(llm, PARAMS) for _ in range(3)))
    assert outputs[0][-1].outputs == outputs[1][-1].outputs == outputs[2][-1].outputs
    await llm.close()
    with pytest.raises(EngineUnavailableError, match="closed"):
        await collect(llm, PARAMS)
