"""What happens to a stream that does not end well, and how its events are batched."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import openai
import pytest

from trivium.errors import EngineUnavailableError
from trivium.outputs import ChoiceDelta, FinishReason
from trivium_gateway.streaming import DONE, MAX_BUFFER_BYTES, EventBuffer
from trivium_gateway.usage import TokenCounts, Usage, count_usage
from unit.gateway.fakes import WAIT_S, Answer, Hang, World, post

PATHS = ["/v1/completions", "/v1/chat/completions"]


def body_for(path: str, text: str, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": text} if path == PATHS[0] else {"messages": [{"role": "user", "content": text}]}
    return {"model": "tiny"} | prompt | fields


def events(answer: Answer) -> list[str]:
    text = answer.body.decode()
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


@pytest.mark.parametrize("path", PATHS)
def test_complete_stream_ends_with_done(world: World, path: str) -> None:
    answer = post(world.port, path, body_for(path, "abc", stream=True))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    *chunks, done = events(answer)
    assert done == "[DONE]"
    assert all("error" not in json.loads(chunk) for chunk in chunks)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("failure", "code"),
    [(EngineUnavailableError("scheduler lost"), "engine_unavailable"), (RuntimeError("secret"), "internal_error")],
)
def test_failure_after_the_first_byte_is_an_event_without_done(
    world: World, path: str, failure: Exception, code: str
) -> None:
    world.tiny.scripts["breaks"] = [ChoiceDelta(0, (65,), "a"), failure]
    answer = post(world.port, path, body_for(path, "breaks", stream=True))
    *chunks, last = events(answer)
    assert answer.status == 200
    assert "".join(chunks).count('"a"') == 1
    assert json.loads(last)["error"]["code"] == code
    assert b"secret" not in answer.body


def test_the_openai_client_raises_on_a_broken_stream(world: World, client: openai.OpenAI) -> None:
    world.tiny.scripts["breaks"] = [ChoiceDelta(0, (65,), "a"), EngineUnavailableError("scheduler lost")]
    texts = []
    with pytest.raises(openai.APIError, match="scheduler lost"):
        for chunk in client.completions.create(model="tiny", prompt="breaks", stream=True):
            texts.append(chunk.choices[0].text)
    assert texts == ["a"]


def test_one_failing_prompt_aborts_the_others(world: World) -> None:
    world.tiny.scripts["hangs"] = [Hang()]
    world.tiny.scripts["fails"] = [ChoiceDelta(0, (65,), "a"), EngineUnavailableError("gone")]
    answer = post(world.port, PATHS[0], {"model": "tiny", "prompt": ["hangs", "fails"]})
    assert answer.error == (503, "engine_unavailable", None)
    assert world.tiny.aborted.get(timeout=WAIT_S) == world.tiny.started.get(timeout=WAIT_S)


@pytest.mark.parametrize("stream", [False, True])
def test_an_abort_by_the_engine_is_an_error_not_a_finish_reason(world: World, stream: bool) -> None:
    world.tiny.scripts["aborts"] = [ChoiceDelta(0, (), "", FinishReason.ABORT)]
    answer = post(world.port, PATHS[0], {"model": "tiny", "prompt": "aborts", "stream": stream})
    assert answer.error == (503, "aborted", None)
    world.tiny.aborted.get(timeout=WAIT_S)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_ends_too_early_is_an_error(world: World, stream: bool) -> None:
    world.tiny.scripts["short"] = []
    answer = post(world.port, PATHS[0], {"model": "tiny", "prompt": "short", "stream": stream})
    assert answer.error == (500, "internal_error", None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", [[], [ChoiceDelta(0, (65,), "a")]], ids=["waiting", "running"])
def test_disconnect_aborts_every_prompt_at_once(world: World, stream: bool, first: list[ChoiceDelta]) -> None:
    for text in ("left-1", "left-2"):
        world.tiny.scripts[text] = [*first, Hang()]
    body = json.dumps({"model": "tiny", "prompt": ["left-1", "left-2"], "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", world.port)) as connection:
        connection.sendall(head + body)
        started = {world.tiny.started.get(timeout=WAIT_S) for _ in range(2)}
        assert world.tiny.aborted.empty()
    assert {world.tiny.aborted.get(timeout=WAIT_S) for _ in range(2)} == started


def test_closing_a_stream_of_the_openai_client_aborts(world: World, client: openai.OpenAI) -> None:
    world.tiny.scripts["closed"] = [ChoiceDelta(0, (65,), "a"), Hang()]
    with client.completions.create(model="tiny", prompt="closed", stream=True) as stream:
        assert next(iter(stream)).choices[0].text == "a"
        request_id = world.tiny.started.get(timeout=WAIT_S)
    assert world.tiny.aborted.get(timeout=WAIT_S) == request_id


class PlainEncoder:
    """The text itself as the event."""

    def chunk(self, choice: int, delta: ChoiceDelta) -> bytes:
        return delta.text.encode()

    def usage(self, usage: Usage) -> bytes:
        return b""


USAGE = count_usage([], TokenCounts(num_output_tokens=2))


@pytest.mark.asyncio
async def test_events_that_came_together_leave_together() -> None:
    buffer = EventBuffer(PlainEncoder())
    for text in ("a", "b", "c"):
        buffer.add(0, ChoiceDelta(0, (1,), text))
    assert await buffer.take() == (b"abc", True)
    buffer.add(0, ChoiceDelta(0, (1,), "d"))
    buffer.finish(USAGE)
    assert await buffer.take() == (b"d" + DONE, False)
    assert buffer.counts.num_output_tokens == 4


@pytest.mark.asyncio
async def test_events_before_a_failure_are_not_lost() -> None:
    buffer = EventBuffer(PlainEncoder())
    buffer.add(0, ChoiceDelta(0, (1,), "a"))
    buffer.fail(EngineUnavailableError("gone"))
    assert await buffer.take() == (b"a", True)
    with pytest.raises(EngineUnavailableError):
        await buffer.take()


@pytest.mark.asyncio
async def test_a_full_buffer_holds_the_pump_until_the_writer_takes() -> None:
    buffer = EventBuffer(PlainEncoder())
    buffer.add(0, ChoiceDelta(0, (1,), "x" * (MAX_BUFFER_BYTES + 1)))
    assert buffer.is_full()
    waiting = asyncio.create_task(buffer.wait_for_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await buffer.take()
    await waiting
    assert not buffer.is_full()
