"""A request waits for its grammar outside the queue: nobody else waits with it, and nothing of it is forgotten."""

from __future__ import annotations

import asyncio

import pytest

from toy import ToyExecutorClient
from trivium import StructuredOutputsParams
from trivium.config import SchedulerConfig
from trivium.errors import EngineUnavailableError, InvalidRequestError, OverloadedError
from trivium.params import BeamSettings
from unit.scheduler.test_engine_loop import expected, running

GRAMMAR = StructuredOutputsParams(regex="a")


class Compiler:
    """Stands in for the executor's: grammars are ready when the test says so."""

    def __init__(self, executor: ToyExecutorClient) -> None:
        self.asked: list[StructuredOutputsParams | None] = []
        self._answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        executor.compile_grammar = self.compile  # type: ignore[method-assign, assignment]

    async def compile(self, params: StructuredOutputsParams | None) -> None:
        self.asked.append(params)
        await asyncio.shield(self._answer)

    def answer(self, error: Exception | None = None) -> None:
        answer, self._answer = self._answer, asyncio.get_running_loop().create_future()
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)

    async def wait_asked(self, count: int) -> None:
        while len(self.asked) < count:
            await asyncio.sleep(0)


@pytest.mark.asyncio
@pytest.mark.parametrize("sampling", [{}, {"n": 3}, {"n": 2, "temperature": 0.0, "beam": BeamSettings(width=2)}])
async def test_others_run_while_a_grammar_is_compiled(sampling: dict[str, object]) -> None:
    async with running() as world:
        compiler = Compiler(world.executor)
        held = world.submit(1, structured_outputs=GRAMMAR, **sampling)
        other = world.submit(2)
        await other.done.wait()
        assert other.outputs[0].token_ids == expected(2)
        assert not held.deltas and world.loop.scheduler.num_running == 0
        compiler.answer()
        await held.done.wait()
        assert held.error is None and all(output.token_ids for output in held.outputs.values())
        assert compiler.asked == [GRAMMAR]


@pytest.mark.asyncio
async def test_a_grammar_that_the_executor_refuses_ends_its_request() -> None:
    async with running() as world:
        compiler = Compiler(world.executor)
        held = world.submit(1, structured_outputs=GRAMMAR, n=2)
        await compiler.wait_asked(1)
        compiler.answer(InvalidRequestError("no", param="structured_outputs.regex"))
        await held.done.wait()
        assert isinstance(held.error, InvalidRequestError)
        await world.submit(2).done.wait()


@pytest.mark.asyncio
async def test_a_client_that_leaves_meanwhile_gets_no_slot() -> None:
    async with running() as world:
        compiler = Compiler(world.executor)
        held = world.submit(1, structured_outputs=GRAMMAR, n=2)
        await compiler.wait_asked(1)
        world.loop.abort(held.keys)  # type: ignore[attr-defined]
        compiler.answer()
        await world.submit(2).done.wait()
        assert not held.deltas and world.loop.scheduler.num_waiting == 0


@pytest.mark.asyncio
async def test_an_executor_that_is_lost_meanwhile_is_asked_again() -> None:
    async with running() as world:
        compiler = Compiler(world.executor)
        held = world.submit(1, structured_outputs=GRAMMAR)
        await compiler.wait_asked(1)
        world.executor.crash()
        compiler.answer(EngineUnavailableError("gone"))
        await compiler.wait_asked(2)
        compiler.answer()
        await held.done.wait()
        assert held.outputs[0].token_ids == expected(1, structured_outputs=GRAMMAR)


@pytest.mark.asyncio
async def test_after_a_crash_a_running_request_waits_for_its_grammar_and_others_do_not() -> None:
    async with running() as world:
        compiler = Compiler(world.executor)
        held = world.submit(1, structured_outputs=GRAMMAR, max_tokens=40)
        await compiler.wait_asked(1)
        compiler.answer()
        while not held.deltas:
            await asyncio.sleep(0)
        world.executor.crash()
        await compiler.wait_asked(2)
        num_before = len(held.deltas)
        await world.submit(2).done.wait()
        assert len(held.deltas) - num_before <= 1  # what was being detokenized
        compiler.answer()
        await held.done.wait()
        assert held.outputs[0].token_ids == expected(1, structured_outputs=GRAMMAR, max_tokens=40)


@pytest.mark.asyncio
async def test_requests_that_wait_for_a_grammar_count_against_the_queue() -> None:
    async with running(SchedulerConfig(max_waiting_requests=3)) as world:
        compiler = Compiler(world.executor)
        world.submit(1, structured_outputs=GRAMMAR, n=2)
        await compiler.wait_asked(1)
        with pytest.raises(OverloadedError):
            world.submit(2, n=2)
        compiler.answer()


@pytest.mark.asyncio
async def test_beams_with_stop_strings_wait_for_the_texts_of_the_tokens() -> None:
    """Others with stop strings wait for nothing."""
    beams = {"temperature": 0.0, "beam": BeamSettings(width=2)}
    async with running() as world:
        compiler = Compiler(world.executor)
        held = world.submit(1, stop=("never said",), **beams)
        other = world.submit(2, stop=("never said",))
        await other.done.wait()
        assert not held.deltas and world.loop.scheduler.num_running == 0
        compiler.answer()
        await held.done.wait()
        assert held.error is None and compiler.asked == [None]
        both = world.submit(3, stop=("never said",), structured_outputs=GRAMMAR, **beams)
        await compiler.wait_asked(2)
        compiler.answer()
        await compiler.wait_asked(3)
        compiler.answer(InvalidRequestError("no tokenizer", param="stop"))
        await both.done.wait()
        assert isinstance(both.error, InvalidRequestError) and both.error.param == "stop"
        assert compiler.asked == [None, GRAMMAR, None]
