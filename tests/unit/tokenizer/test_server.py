"""The tokenizer service over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from trivium import columns, rpc, tokenizer_client
from trivium.config import ServedModel
from trivium.errors import ConfigurationError, InvalidRequestError
from trivium.inputs import PairTexts
from trivium.ledger import ask_ledger
from trivium.tokenizer import chat_template
from trivium.tokenizer import server as server_module
from trivium.tokenizer.server import SERVICE_NAME, TokenizerServicer, serve
from trivium.tokenizer.tokenizer import Tokenizer
from trivium.tokenizer_client import TokenizerClient
from trivium.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from unit.tokenizer.tiny_languages import save_multilingual
from unit.tokenizer.tiny_tokenizers import make_tokenizer, save_model

CHAT = [{"role": "user", "content": "hello"}]
MODELS = ["bpe", "uni", "endless"]
ENDLESS = "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}"


@asynccontextmanager
async def running_server(tmp_path: Path) -> AsyncIterator[tuple[grpc.aio.Channel, asyncio.Event]]:
    """A ready server of MODELS; the event stops it."""
    models = [
        ServedModel("bpe", save_model(tmp_path / "bpe")),
        ServedModel("uni", save_model(tmp_path / "uni", "metaspace", template=None)),
        ServedModel("endless", save_model(tmp_path / "endless", template=ENDLESS)),
    ]
    address, stop = f"unix:{tmp_path}/s", asyncio.Event()
    task = asyncio.create_task(serve(models, address, stop))
    try:
        async with rpc.open_channel(address) as channel:
            while not await rpc.check_health(channel, SERVICE_NAME):
                assert not task.done(), "the server ended"
                await asyncio.sleep(0.01)
            yield channel, stop
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


class Stream:
    """One Detokenize stream, a command at a time."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = tokenizer_pb2_grpc.TokenizerStub(channel).Detokenize()

    async def hello(self, model: str = "bpe") -> Any:
        await self.call.write(tokenizer_pb2.DetokenizeCommand(hello=tokenizer_pb2.DetokenizeHello(model=model)))
        return await self.call.read()

    async def push(self, rows: list[tuple[int, list[int], bool]], opens: tuple[int, ...] = (), **fields: Any) -> Any:
        counts, ids = columns.pack_ragged([row[1] for row in rows])
        push = tokenizer_pb2.DetokenizePush(
            opens=[tokenizer_pb2.DetokenizeOpen(handle=h, skip_special_tokens=True, stop=["STOP"]) for h in opens],
            handles=columns.pack(row[0] for row in rows),
            counts=counts,
            ids=ids,
            final=columns.pack((row[2] for row in rows), "B"),
        )
        for name, value in fields.items():
            setattr(push, name, value)
        await self.call.write(tokenizer_pb2.DetokenizeCommand(push=push))
        return await self.call.read()

    async def status(self) -> grpc.StatusCode:
        code = await asyncio.wait_for(self.call.code(), 5)
        assert isinstance(code, grpc.StatusCode)
        return code


async def failure(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code()


@pytest.mark.asyncio
async def test_texts_of_any_served_model_are_encoded(tmp_path: Path) -> None:
    async with running_server(tmp_path) as (channel, _):
        stub = tokenizer_pb2_grpc.TokenizerStub(channel)
        for model, tokenizer in (("bpe", make_tokenizer()), ("uni", make_tokenizer("metaspace"))):
            response = await stub.Encode(tokenizer_pb2.EncodeRequest(model=model, texts=["one two", "", "x"]))
            assert [list(output.ids) for output in response.outputs] == tokenizer.encode(["one two", "", "x"])
        request = tokenizer_pb2.EncodeRequest(model="nobody", texts=["x"])
        assert await failure(stub.Encode(request)) is grpc.StatusCode.NOT_FOUND


@pytest.mark.asyncio
async def test_chats_are_rendered(tmp_path: Path) -> None:
    async with running_server(tmp_path) as (channel, _):
        stub = tokenizer_pb2_grpc.TokenizerStub(channel)
        chat = json.dumps(CHAT).encode()
        response = await stub.Render(tokenizer_pb2.RenderRequest(model="bpe", messages_json=chat))
        assert list(response.prompt.ids) == make_tokenizer().render_chat(CHAT)
        prefill = tokenizer_pb2.RenderRequest(model="bpe", messages_json=chat, continue_final_message=True)
        expected = make_tokenizer().render_chat(CHAT, add_generation_prompt=False, continue_final_message=True)
        assert list((await stub.Render(prefill)).prompt.ids) == expected
        prefill.add_generation_prompt = True
        assert await failure(stub.Render(prefill)) is grpc.StatusCode.INVALID_ARGUMENT
        no_template = tokenizer_pb2.RenderRequest(model="uni", messages_json=chat)
        assert await failure(stub.Render(no_template)) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.asyncio
async def test_pushes_are_answered_one_by_one_and_in_order(tmp_path: Path) -> None:
    async with running_server(tmp_path) as (channel, _):
        stream = Stream(channel)
        welcome = await stream.hello()
        assert welcome.welcome.tokenizer_epoch != 0
        words = {1: "one two 😀", 2: "naïve STOP café", 3: "日本語"}
        left = {handle: make_tokenizer().encode([word])[0] for handle, word in words.items()}
        text = dict.fromkeys(words, "")
        sequence, opens = 0, tuple(words)
        while any(left.values()):
            sequence += 1
            rows = [(handle, [ids.pop(0)], not ids) for handle, ids in left.items() if ids]
            event = await stream.push(rows, opens, sequence=sequence)
            assert event.text.sequence == sequence
            for (handle, _, _), part in zip(rows, event.text.texts, strict=True):
                text[handle] += part
            opens = ()
        assert text == {1: "one two 😀", 2: "naïve ", 3: "日本語"}


@pytest.mark.asyncio
async def test_a_long_push_is_answered_like_a_short_one(tmp_path: Path) -> None:
    async with running_server(tmp_path) as (channel, _):
        stream = Stream(channel)
        await stream.hello()
        (ids,) = make_tokenizer().encode(["one two " * 1000])
        event = await stream.push([(1, ids, True)], (1,), sequence=5)
        assert (event.text.sequence, list(event.text.texts)) == (5, ["one two " * 1000])


@pytest.mark.asyncio
async def test_a_malformed_push_ends_its_own_stream_only(tmp_path: Path) -> None:
    async with running_server(tmp_path) as (channel, _):
        good, bad, unknown, twice = (Stream(channel) for _ in range(4))
        for stream in (good, bad, unknown, twice):
            await stream.hello()
        assert await failure(bad.push([(1, [5], False)], (1,), counts=b"\1")) is grpc.StatusCode.INVALID_ARGUMENT
        assert await failure(unknown.push([(1, [5], False)])) is grpc.StatusCode.INVALID_ARGUMENT
        assert await failure(twice.push([], (1, 1))) is grpc.StatusCode.INVALID_ARGUMENT
        ids = make_tokenizer().encode(["one"])[0]
        assert list((await good.push([(1, ids, True)], (1,))).text.texts) == ["one"]


@pytest.mark.asyncio
async def test_a_stream_begins_with_one_hello_for_a_served_model(tmp_path: Path) -> None:
    async with running_server(tmp_path) as (channel, _):
        stranger, hasty, twice = (Stream(channel) for _ in range(3))
        assert await failure(stranger.hello("nobody")) is grpc.StatusCode.NOT_FOUND
        assert await failure(hasty.push([])) is grpc.StatusCode.INVALID_ARGUMENT
        await twice.hello()
        assert await failure(twice.hello()) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.asyncio
async def test_handles_die_with_their_stream(tmp_path: Path) -> None:
    async with running_server(tmp_path) as (channel, _):
        first, second = Stream(channel), Stream(channel)
        await first.hello()
        await first.push([], (1,))
        first.call.cancel()
        await second.hello()
        assert await failure(second.push([(1, [5], False)])) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.asyncio
async def test_a_stream_that_the_client_ends_ends_well(tmp_path: Path) -> None:
    async with running_server(tmp_path) as (channel, _):
        stream = Stream(channel)
        await stream.hello()
        await stream.call.done_writing()
        assert await stream.status() is grpc.StatusCode.OK


@pytest.mark.asyncio
async def test_stopping_ends_open_streams_at_once(tmp_path: Path) -> None:
    async with running_server(tmp_path) as (channel, stop):
        stream = Stream(channel)
        await stream.hello()
        stop.set()
        assert await stream.status() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.asyncio
async def test_a_stream_that_is_ended_while_its_welcome_is_written_sees_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servicers: list[TokenizerServicer] = []
    start, make_session = TokenizerServicer.__init__, server_module.DetokenizeSession

    def note(self: TokenizerServicer, *args: Any) -> None:
        start(self, *args)
        servicers.append(self)

    def end_soon(tokenizer: Tokenizer) -> Any:
        asyncio.get_running_loop().call_soon(servicers[0].end_streams)
        return make_session(tokenizer)

    monkeypatch.setattr(TokenizerServicer, "__init__", note)
    monkeypatch.setattr(server_module, "DetokenizeSession", end_soon)
    async with running_server(tmp_path) as (channel, _):
        stream = Stream(channel)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stream.hello()
        assert await stream.status() is grpc.StatusCode.UNAVAILABLE
        assert await stream.call.details() == "the service is shutting down"


@pytest.mark.asyncio
async def test_templates_that_never_end_are_stopped_and_leave_their_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_CPU_S", 0.1)
    async with running_server(tmp_path) as (channel, _):
        stub = tokenizer_pb2_grpc.TokenizerStub(channel)
        request = tokenizer_pb2.RenderRequest(model="endless", messages_json=json.dumps(CHAT).encode())
        given_up = stub.Render(request)  # by its caller, who need not tell the thread
        await asyncio.sleep(0.05)
        given_up.cancel()
        for _ in range(10):  # more than there are threads
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Render(request)
            error = rpc.error_from_rpc(raised.value)
            assert isinstance(error, InvalidRequestError) and error.code == "template_error"
        response = await stub.Render(tokenizer_pb2.RenderRequest(model="bpe", messages_json=request.messages_json))
        assert list(response.prompt.ids) == make_tokenizer().render_chat(CHAT)


@pytest.mark.asyncio
async def test_a_full_queue_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_server(tmp_path) as (channel, _):
        monkeypatch.setattr(server_module, "MAX_WAITING_CALLS", 0)
        stub = tokenizer_pb2_grpc.TokenizerStub(channel)
        request = tokenizer_pb2.EncodeRequest(model="bpe", texts=["x"])
        assert await failure(stub.Encode(request)) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.asyncio
async def test_the_server_is_alive_but_not_ready_while_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load = threading.Event()
    load = Tokenizer.load

    def slow_load(source: str, revision: str | None = None) -> Tokenizer:
        may_load.wait(10)
        return load(source, revision)

    monkeypatch.setattr(Tokenizer, "load", slow_load)
    address, stop = f"unix:{tmp_path}/s", asyncio.Event()
    task = asyncio.create_task(serve([ServedModel("bpe", save_model(tmp_path / "bpe"))], address, stop))
    async with rpc.open_channel(address) as channel:
        while not await rpc.check_health(channel, ""):
            await asyncio.sleep(0.01)
        assert not await rpc.check_health(channel, SERVICE_NAME)
        request = tokenizer_pb2.EncodeRequest(model="bpe", texts=["x"])
        assert await failure(tokenizer_pb2_grpc.TokenizerStub(channel).Encode(request)) is grpc.StatusCode.UNAVAILABLE
        may_load.set()
        while not await rpc.check_health(channel, SERVICE_NAME):
            await asyncio.sleep(0.01)
    stop.set()
    await asyncio.wait_for(task, 10)


@pytest.mark.asyncio
async def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        await serve([ServedModel("m", f"{tmp_path}/none")], f"unix:{tmp_path}/s", asyncio.Event())
    with pytest.raises(ConfigurationError):
        await serve([], f"unix:{tmp_path}/s", asyncio.Event())


@pytest.mark.asyncio
async def test_the_ledger_counts_handles_until_they_are_closed_or_their_stream_ends(tmp_path: Path) -> None:
    async def handles() -> tuple[int, int]:
        reply = await ask_ledger(channel)
        assert reply is not None and reply.service == "tokenizer" and list(reply.tokenizer.models) == MODELS
        return reply.open_streams, reply.tokenizer.detokenize_handles

    async with running_server(tmp_path) as (channel, _):
        assert await handles() == (0, 0)
        first, second = Stream(channel), Stream(channel)
        for stream in (first, second):
            await stream.hello()
            await stream.push([(1, [5], False)], opens=(1, 2))
        assert await handles() == (2, 4)
        await first.push([(1, [5], True)])
        assert await handles() == (2, 3)
        await first.push([], closed_handles=columns.pack([2]))
        assert await handles() == (2, 2)
        second.call.cancel()
        async with asyncio.timeout(5):
            while await handles() != (1, 0):
                await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_single_tokens_are_told_as_text_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_server(tmp_path) as (channel, _):
        tokenizer = make_tokenizer()
        ids = [0, 5, 5, tokenizer.vocab_size + 9, *tokenizer.encode(["\U0001f9ff"])[0]]
        client = TokenizerClient("bpe", channel)
        monkeypatch.setattr(tokenizer_client, "MAX_TOKENS", 2)
        texts = await client.token_texts(ids)
        assert [texts[token_id] for token_id in ids] == tokenizer.token_texts(ids)
        stub = tokenizer_pb2_grpc.TokenizerStub(channel)
        too_many = tokenizer_pb2.GetTokensRequest(model="bpe", ids=range(server_module.MAX_TOKENS + 1))
        assert await failure(stub.GetTokens(too_many)) is grpc.StatusCode.INVALID_ARGUMENT
        unknown = tokenizer_pb2.GetTokensRequest(model="nobody", ids=[1])
        assert await failure(stub.GetTokens(unknown)) is grpc.StatusCode.NOT_FOUND


@pytest.mark.asyncio
async def test_a_token_is_asked_for_once(tmp_path: Path) -> None:
    async with running_server(tmp_path) as (channel, stop):
        client = TokenizerClient("bpe", channel)
        before = dict(await client.token_texts([5, 6]))
        stop.set()
        assert await client.token_texts([6, 5]) == before


@pytest.mark.asyncio
async def test_both_sides_of_a_prompt_are_encoded_with_their_languages(tmp_path: Path) -> None:
    source = save_multilingual(tmp_path / "nllb", "nllb")
    address, stop = f"unix:{tmp_path}/s", asyncio.Event()
    task = asyncio.create_task(serve([ServedModel("nllb", source)], address, stop))
    async with rpc.open_channel(address) as channel:
        client = TokenizerClient("nllb", channel)
        texts = PairTexts("one", "two", source_language="fr", target_language="en")
        assert await client.encode_pair(texts) == Tokenizer.load(source).encode_pair(texts)
        with pytest.raises(InvalidRequestError) as raised:
            await client.encode_pair(PairTexts("one", target_language="zh"))
        assert (raised.value.param, raised.value.code) == ("target_language", "ambiguous_language")
    stop.set()
    await asyncio.wait_for(task, 10)
