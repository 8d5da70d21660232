"""The client of the tokenizer service: its answers, its errors, its patience."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from trivium import rpc, tokenizer_client
from trivium.errors import EngineUnavailableError, InternalError, InvalidRequestError, ModelNotFoundError, TriviumError
from trivium.tokenizer_client import TokenizerClient
from trivium.v1 import tokenizer_pb2, tokenizer_pb2_grpc, types_pb2

CHAT = [{"role": "user", "content": "hi"}]


class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServicer):
    """Encodes a text as its code points; fails first with the given errors."""

    def __init__(self, *errors: TriviumError | None) -> None:
        self.errors = list(errors)
        self.requests: list[Any] = []

    async def Encode(self, request: tokenizer_pb2.EncodeRequest, context: Any) -> Any:
        async def handler() -> tokenizer_pb2.EncodeResponse:
            self._record(request)
            outputs = [types_pb2.TokensPrompt(ids=map(ord, text)) for text in request.texts]
            return tokenizer_pb2.EncodeResponse(outputs=outputs)

        return await rpc.answer(context, handler)

    async def Render(self, request: tokenizer_pb2.RenderRequest, context: Any) -> Any:
        async def handler() -> tokenizer_pb2.RenderResponse:
            self._record(request)
            return tokenizer_pb2.RenderResponse(prompt=types_pb2.TokensPrompt(ids=[1, 2]))

        return await rpc.answer(context, handler)

    def _record(self, request: Any) -> None:
        self.requests.append(request)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error


@asynccontextmanager
async def serving(fake: FakeTokenizer, tmp_path: Path) -> AsyncIterator[TokenizerClient]:
    server = rpc.Server(f"unix:{tmp_path}/s", ("trivium.v1.Tokenizer",))
    tokenizer_pb2_grpc.add_TokenizerServicer_to_server(fake, server.grpc_server)
    await server.start()
    try:
        async with rpc.open_channel(server.address) as channel:
            yield TokenizerClient("m", channel)
    finally:
        await server.stop(0.0)


@pytest.mark.asyncio
async def test_texts_become_ids(tmp_path: Path) -> None:
    fake = FakeTokenizer()
    async with serving(fake, tmp_path) as client:
        assert await client.encode(["ab", "", "c"], add_special_tokens=False) == [[97, 98], [], [99]]
        assert await client.encode(["a"]) == [[97]]
    assert [(request.model, request.add_special_tokens) for request in fake.requests] == [("m", False), ("m", True)]


@pytest.mark.asyncio
async def test_a_chat_becomes_ids(tmp_path: Path) -> None:
    fake = FakeTokenizer()
    async with serving(fake, tmp_path) as client:
        assert await client.render(CHAT) == [1, 2]
        await client.render(CHAT, tools=[{"a": 1}], add_generation_prompt=False, continue_final_message=True)
    plain, full = fake.requests
    assert (plain.messages_json, plain.tools_json) == (b'[{"role":"user","content":"hi"}]', b"")
    assert (plain.add_generation_prompt, plain.continue_final_message) == (True, False)
    assert full.tools_json == b'[{"a":1}]'
    assert full.HasField("add_generation_prompt") and not full.add_generation_prompt and full.continue_final_message


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("no", param="messages", code="template_error"),
        ModelNotFoundError("who?", param="model"),
        InternalError("internal error"),
    ],
)
async def test_errors_arrive_as_they_were_raised(error: TriviumError, tmp_path: Path) -> None:
    fake = FakeTokenizer(error)
    async with serving(fake, tmp_path) as client:
        with pytest.raises(type(error)) as raised:
            await client.render(CHAT)
    assert (raised.value.message, raised.value.param, raised.value.code) == (error.message, error.param, error.code)
    assert len(fake.requests) == 1, "such an error is not tried again"


@pytest.mark.asyncio
async def test_a_tokenizer_that_is_starting_is_asked_again(tmp_path: Path) -> None:
    fake = FakeTokenizer(EngineUnavailableError("starting"), EngineUnavailableError("starting"))
    async with serving(fake, tmp_path) as client:
        assert await client.encode(["a"]) == [[97]]
    assert len(fake.requests) == 3


@pytest.mark.asyncio
async def test_a_call_before_the_server_listens_waits_for_it(tmp_path: Path) -> None:
    async with rpc.open_channel(f"unix:{tmp_path}/s") as channel:
        call = asyncio.create_task(TokenizerClient("m", channel).encode(["a"]))
        await asyncio.sleep(0.05)
        async with serving(FakeTokenizer(), tmp_path):
            assert await call == [[97]]


@pytest.mark.asyncio
async def test_a_tokenizer_that_never_comes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_client, "CALL_TIMEOUT_S", 0.2)
    async with rpc.open_channel(f"unix:{tmp_path}/s") as channel:
        with pytest.raises(EngineUnavailableError):
            await TokenizerClient("m", channel).encode(["a"])


@pytest.mark.asyncio
async def test_a_tokenizer_that_stays_unavailable_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_client, "CALL_TIMEOUT_S", 0.3)
    fake = FakeTokenizer(*[EngineUnavailableError("draining", code="draining")] * 99)
    async with serving(fake, tmp_path) as client:
        with pytest.raises(EngineUnavailableError, match="draining"):
            await client.encode(["a"])
    assert len(fake.requests) > 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.encode(["\ud800"]),
        lambda client: client.render([{"role": object()}]),
        lambda client: client.render(CHAT, tools=[{1: {2}}]),
    ],
)
async def test_what_cannot_be_sent_is_refused(call: Callable[[TokenizerClient], Any], tmp_path: Path) -> None:
    async with rpc.open_channel(f"unix:{tmp_path}/s") as channel:
        with pytest.raises(InvalidRequestError):
            await call(TokenizerClient("m", channel))
