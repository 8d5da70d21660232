"""A scripted engine at the `EngineClient` seam, and a real server around it in a thread of its own."""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import threading
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvloop

from trivium.config import GatewayConfig, ModelInfo
from trivium.errors import EngineUnavailableError, InvalidRequestError
from trivium.inputs import EncodedPair, GenerationRequest, PairTexts
from trivium.outputs import ChoiceDelta, FinishReason, TokenText
from trivium.pooling import PoolingParams
from trivium.structured_outputs import StructuredOutputsParams
from trivium.v1.ledger_pb2 import LedgerReply
from trivium_gateway.app import create_app
from trivium_gateway.drain import Drain
from trivium_gateway.routing import ModelRoutes
from trivium_gateway.server import bind, run_server

WAIT_S = 5.0
VOCAB_SIZE = 300
DECODER_START = 256
LANGUAGES = {"fr": 257, "de": 258}
MAX_MODEL_LEN = 1000
MAX_ENCODER_LEN = 400

STOP = FinishReason.STOP
LENGTH = FinishReason.LENGTH


HIDDEN_SIZE = 8


def make_info(name: str, *, is_encoder_decoder: bool = False, max_model_len: int = MAX_MODEL_LEN) -> ModelInfo:
    return ModelInfo(
        name=name,
        architecture="Fake",
        is_encoder_decoder=is_encoder_decoder,
        max_model_len=max_model_len,
        max_encoder_len=MAX_ENCODER_LEN if is_encoder_decoder else 0,
        vocab_size=VOCAB_SIZE,
        dtype="float32",
        block_size=16,
        num_blocks=64,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        hidden_size=HIDDEN_SIZE,
        decoder_start_token_id=DECODER_START if is_encoder_decoder else None,
    )


@dataclass(frozen=True, slots=True)
class Pause:
    """A script step in which nothing happens."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Hang:
    """A script step that never ends."""


Step = ChoiceDelta | Exception | Pause | Hang
HELLO = ("Hel", "lo ", "world")


def deltas(
    *texts: str, index: int = 0, finish: FinishReason = STOP, stop_reason: str | int | None = None
) -> list[Step]:
    """One delta of one token per text, the last one with the finish reason."""
    steps: list[Step] = [ChoiceDelta(index, (65,), text) for text in texts[:-1]]
    return [*steps, ChoiceDelta(index, (65,), texts[-1], finish, stop_reason)]


class FakeEngine:
    """Tokens are UTF-8 bytes. What a prompt text generates is looked up in `scripts`; without a script it is HELLO.

    Used from two threads: the server's calls the methods, the test's reads `requests` and waits on the queues.
    """

    def __init__(self, info: ModelInfo, *, is_ready: bool = True) -> None:
        self._info = info
        self.ready = is_ready
        self.scripts: dict[str, Sequence[Step]] = {}  # prompt text -> steps
        self.ledgers: dict[str, LedgerReply | None] = {}  # service -> its answer
        self.requests: list[GenerationRequest] = []
        self.rendered: list[tuple[Sequence[Mapping[str, Any]], bool, bool]] = []
        self.template_inputs: list[tuple[Any, Any]] = []  # (tools, template_kwargs) of each rendered chat
        self.packs: list[list[list[int]]] = []  # prompts of each call for vectors
        self.started: queue.Queue[str] = queue.Queue()  # ids of requests that hang
        self.aborted: queue.Queue[str] = queue.Queue()  # ids of requests whose iterator was closed early

    @property
    def model_info(self) -> ModelInfo:
        if not self.ready:
            raise EngineUnavailableError("the model is not loaded yet")
        return self._info

    def is_ready(self) -> bool:
        return self.ready

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    async def encode_pair(self, texts: PairTexts) -> EncodedPair:
        """The languages are "fr" and "de", tokens 257 and 258; a model of the name "many" has no default."""
        for name in ("source_language", "target_language"):
            if getattr(texts, name) not in (None, *LANGUAGES):
                raise InvalidRequestError("no such language", param=name, code="unknown_language")
        return EncodedPair(
            encoder=tuple((texts.encoder or "").encode()),
            decoder=tuple((texts.decoder or "").encode()),
            forced_bos_token_id=LANGUAGES.get(texts.target_language or ""),
            needs_target_language=self._info.name == "many" and texts.target_language is None,
        )

    async def check_grammar(self, params: StructuredOutputsParams) -> None:
        if params.regex == "(":
            raise InvalidRequestError(f"{params.param}: wrong", param=params.param, code="invalid_grammar")

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        self.rendered.append((messages, add_generation_prompt, continue_final_message))
        self.template_inputs.append((tools, template_kwargs))
        if messages[-1]["content"] == "refused by template":
            raise InvalidRequestError("roles must alternate", param="messages", code="template_error")
        ids, num_embeds = list[int](), 0  # of the last message
        for message in messages:
            content = message["content"]
            ids = list(content.encode()) if isinstance(content, str) else []
            for part in content if isinstance(content, list) else []:
                num_embeds += part["type"] == "prompt_embeds"
                ids += list(part["text"].encode()) if part["type"] == "text" else [-num_embeds]
        return ids

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        shown = (f"<{token_id}>" if token_id > 255 else chr(token_id) for token_id in token_ids)
        return "".join(text for text in shown if not (skip_special_tokens and len(text) > 1))

    async def embed(self, prompts: Sequence[Sequence[int]], params: PoolingParams) -> list[Sequence[float]]:
        """[number of tokens, sum of the ids, 1 if normalised]."""
        self.packs.append([list(prompt) for prompt in prompts])
        return [(float(len(prompt)), float(sum(prompt)), float(params.normalize)) for prompt in prompts]

    async def token_texts(self, token_ids: Collection[int]) -> Mapping[int, TokenText]:
        return {
            token_id: TokenText(bytes([token_id]).decode(errors="replace"), bytes([token_id]))
            if token_id < 256
            else TokenText("</s>", b"</s>", is_special=True)
            for token_id in token_ids
        }

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[ChoiceDelta, None]:
        self.requests.append(request)
        ids = request.prompt.encoder_token_ids or request.prompt.token_ids
        script = self.scripts.get(bytes(ids).decode(errors="replace"))
        if script is None:
            choices = range(request.sampling.n)
            script = [step for index in choices for step in deltas(*HELLO, index=index)]
        try:
            for step in script:
                await asyncio.sleep(0)
                if isinstance(step, Hang):
                    self.started.put(request.request_id)
                    await asyncio.Event().wait()
                elif isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.put(request.request_id)
            raise

    async def ledger(self) -> dict[str, LedgerReply | None]:
        return dict(self.ledgers)

    async def close(self) -> None:
        return None


class RunningServer:
    """A gateway on a free port of 127.0.0.1, in a thread with a uvloop loop. `stop` ends it and waits.

    settings: of GatewayConfig.
    """

    def __init__(self, engines: Mapping[str, FakeEngine], **settings: Any) -> None:
        self._listener = bind("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self._engines = engines
        self._config = GatewayConfig(**settings)
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._is_up.wait(WAIT_S)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        drain = Drain()
        app = create_app(ModelRoutes(self._engines), config=self._config, drain=drain)
        self._is_up.set()
        timeout_s = self._config.drain_timeout_s
        await run_server(app, self._listener, drain=drain, stop=self._stop, drain_timeout_s=timeout_s)

    def begin_stop(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the server did not stop"

    def stop(self) -> None:
        if self._thread.is_alive():
            self.begin_stop()
        self.join()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@dataclass(frozen=True, slots=True)
class World:
    """A running gateway with a decoder-only, an encoder-decoder, and a model that never loads."""

    server: RunningServer
    tiny: FakeEngine
    translator: FakeEngine

    @property
    def port(self) -> int:
        return self.server.port


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response, read whole."""

    status: int
    headers: Mapping[str, str]  # lower-case names
    body: bytes = field(repr=False)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str | None, str | None]:
        """(status, code, param) of an error, whose body must have the OpenAI shape."""
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"]
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}, error
        assert error["message"]
        return self.status, error["code"], error["param"]


def request(
    port: int, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        answer_headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, answer_headers, response.read())
    finally:
        connection.close()


def post(port: int, path: str, value: object, **headers: str) -> Answer:
    """POST `value` as JSON, or as it is if it is bytes."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return request(port, "POST", path, body, {"Content-Type": "application/json"} | named)
