"""Prompt embeddings through real processes: the openai client, a direct stub, and processes that are killed."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import openai
import pytest
import torch

from cluster import Cluster, serve
from embeds import embed, generate_from, saved, soft_rows
from tiny import load_oracle, save_tiny
from trivium import rpc
from trivium.v1 import scheduler_pb2, scheduler_pb2_grpc, types_pb2

pytestmark = pytest.mark.xdist_group("recovery")

IDS = [5 + index % 200 for index in range(40)]
MAX_TOKENS = 1200
TEMPLATE = "{% for message in messages %}<s>{{ message.content }}</s>{% endfor %}<s>"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("embeds")
    llama = save_tiny("llama", folder / "llama", with_tokenizer=True, max_position_embeddings=2048)
    (llama / "chat_template.jinja").write_text(TEMPLATE)
    return {"llama": llama, "bart": save_tiny("bart", folder / "bart", with_tokenizer=True)}


@pytest.fixture(scope="module")
def cluster(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    models = [f"{name}={path}" for name, path in paths.items()]
    log = tmp_path_factory.mktemp("embeds-log") / "serve.log"
    with serve(*models, "--enable-prompt-embeds", "--max-num-batched-tokens", "16", log=log) as cluster:
        yield cluster


def encoded(rows: torch.Tensor) -> str:
    return base64.b64encode(saved(rows)).decode()


def complete(cluster: Cluster, **body: Any) -> Any:
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        return client.completions.create(
            prompt=body.pop("prompt", ""), temperature=0, max_tokens=body.pop("max_tokens", 12), **body
        )


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_embeddings_of_a_text_say_what_the_text_says(cluster: Cluster, paths: dict[str, Path], name: str) -> None:
    model = load_oracle(paths[name])
    rows = embed(model, IDS)
    completion = complete(cluster, model=name, prompt=[IDS], n=1, extra_body={"prompt_embeds": encoded(rows)})
    assert len(completion.choices) == 2
    assert completion.choices[0].text == completion.choices[1].text != ""


def scheduler_address(cluster: Cluster, name: str) -> str:
    for process in cluster.children().values():
        argv = process.cmdline()
        if "scheduler" in argv and name in argv:
            return argv[argv.index("--listen") + 1]
    raise AssertionError(f"no scheduler of {name}")


async def generate(address: str, prompt: types_pb2.Prompt, **sampling: Any) -> tuple[scheduler_pb2.Accepted, list[int]]:
    params = types_pb2.SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **sampling})
    channel = rpc.open_channel(address)
    try:
        call = scheduler_pb2_grpc.SchedulerStub(channel).Generate(
            scheduler_pb2.GenerateRequest(prompt=prompt, sampling=params)
        )
        accepted, ids = scheduler_pb2.Accepted(), []
        async for response in call:
            if response.WhichOneof("event") == "accepted":
                accepted = response.accepted
            ids += response.delta.token_ids
        return accepted, ids
    finally:
        await channel.close()


def message(rows: torch.Tensor, **fields: Any) -> types_pb2.SingletonPrompt:
    data = rows.contiguous().view(torch.uint8).numpy().tobytes()
    dtype = str(rows.dtype).removeprefix("torch.")
    embeds = types_pb2.EmbedsPrompt(**{"data": data, "shape": rows.shape, "dtype": dtype, **fields})
    return types_pb2.SingletonPrompt(embeds=embeds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_direct_stub_sends_bytes(cluster: Cluster, paths: dict[str, Path], dtype: torch.dtype) -> None:
    rows = soft_rows(load_oracle(paths["llama"]), IDS).to(dtype)
    prompt = types_pb2.Prompt(single=message(rows))
    accepted, ids = asyncio.run(generate(scheduler_address(cluster, "llama"), prompt))
    assert ids == generate_from(paths["llama"], rows.float(), max_new_tokens=12)
    assert list(accepted.prompt_token_ids) == [0] * len(rows)


def test_a_direct_stub_pairs_encoder_embeddings_with_decoder_tokens(cluster: Cluster, paths: dict[str, Path]) -> None:
    rows = soft_rows(load_oracle(paths["bart"]), IDS)
    decoder = types_pb2.SingletonPrompt(tokens=types_pb2.TokensPrompt(ids=[2, 9, 10]))
    pair = types_pb2.EncoderDecoderPrompt(encoder=message(rows), decoder=decoder)
    prompt = types_pb2.Prompt(encoder_decoder=pair)
    _, ids = asyncio.run(generate(scheduler_address(cluster, "bart"), prompt))
    assert ids == generate_from(paths["bart"], rows, decoder=[2, 9, 10], max_new_tokens=12)


def test_a_direct_stub_mixes_text_ids_and_embeddings(cluster: Cluster, paths: dict[str, Path]) -> None:
    model = load_oracle(paths["llama"])
    rows = soft_rows(model, IDS)
    text = types_pb2.SingletonPrompt(text=types_pb2.TextPrompt(text="ab"))
    ids = types_pb2.SingletonPrompt(tokens=types_pb2.TokensPrompt(ids=[9, 10]))
    mixed = types_pb2.MixedPrompt(parts=[ids, message(rows), text])
    prompt = types_pb2.Prompt(single=types_pb2.SingletonPrompt(mixed=mixed))
    accepted, found = asyncio.run(generate(scheduler_address(cluster, "llama"), prompt))
    sent = list(accepted.prompt_token_ids)
    assert sent[:-2] == [9, 10, *[0] * 40] and len(sent) == 44
    whole = torch.cat((embed(model, [9, 10]), rows, embed(model, sent[-2:])))
    assert found == generate_from(paths["llama"], whole, max_new_tokens=12)
    nested = types_pb2.SingletonPrompt(mixed=types_pb2.MixedPrompt(parts=[types_pb2.SingletonPrompt(mixed=mixed)]))
    with pytest.raises(grpc.aio.AioRpcError, match="must not have parts itself"):
        asyncio.run(generate(scheduler_address(cluster, "llama"), types_pb2.Prompt(single=nested)))


@pytest.mark.parametrize("service", [None, "scheduler"])
def test_a_chat_with_embeddings_in_it_goes_on_after_a_kill(
    cluster: Cluster, paths: dict[str, Path], service: str | None
) -> None:
    model = load_oracle(paths["llama"])
    rows, num_tokens = soft_rows(model, IDS), 12 if service is None else 300
    content = [{"type": "prompt_embeds", "data": encoded(rows)}, {"type": "text", "text": "so?"}]
    found: list[int] = []
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="llama",
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
            max_tokens=num_tokens,
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        for number, chunk in enumerate(stream):
            found += getattr(chunk.choices[0], "token_ids", [])
            if number == 0:
                ids = chunk.prompt_token_ids  # type: ignore[attr-defined]
            if number == 5 and service is not None:
                for process in cluster.children().values():
                    if service in process.cmdline() and "llama" in process.cmdline():
                        process.kill()
    whole = torch.cat((embed(model, ids[:1]), rows, embed(model, ids[41:])))
    assert ids[1:41] == [0] * 40
    expected = generate_from(paths["llama"], whole, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0)
    assert found == expected
    cluster.wait_ready()


@pytest.mark.parametrize(
    "fields",
    [{"shape": [40, 47]}, {"shape": [40]}, {"shape": []}, {"dtype": "int8"}, {"data": b""}, {"shape": [2**31, 48]}],
)
def test_a_direct_stub_that_sends_something_else_is_refused(cluster: Cluster, fields: dict[str, Any]) -> None:
    prompt = types_pb2.Prompt(single=message(torch.ones(40, 48), **fields))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(generate(scheduler_address(cluster, "llama"), prompt))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata() or ())[rpc.PARAM_METADATA] == "prompt_embeds"


class Stream(threading.Thread):
    """One streamed completion of embeddings; `first` is set with its first text."""

    def __init__(self, cluster: Cluster, rows: torch.Tensor, temperature: float, n: int) -> None:
        super().__init__(daemon=True)
        self.cluster, self.rows, self.temperature, self.n = cluster, rows, temperature, n
        self.first = threading.Event()
        self.texts = [""] * n
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with openai.OpenAI(base_url=self.cluster.url, api_key="none", max_retries=0) as client:
                chunks = client.completions.create(
                    model="llama",
                    prompt="",
                    max_tokens=MAX_TOKENS,
                    temperature=self.temperature,
                    seed=7,
                    n=self.n,
                    stream=True,
                    extra_body={"ignore_eos": True, "prompt_embeds": encoded(self.rows)},
                )
                for chunk in chunks:
                    self.texts[chunk.choices[0].index] += chunk.choices[0].text
                    self.first.set()
        except Exception as error:
            self.error = error
        finally:
            self.first.set()


def run_streams(cluster: Cluster, rows: torch.Tensor, service: str | None) -> list[list[str]]:
    streams = [Stream(cluster, rows + index, float(index % 2), 1 + index % 2) for index in range(3)]
    for stream in streams:
        stream.start()
    for stream in streams:
        assert stream.first.wait(60)
    if service is not None:
        named = [process for process in cluster.children().values() if service in process.cmdline()]
        next(process for process in named if any("llama" in part for part in process.cmdline())).kill()
    for stream in streams:
        stream.join(100)
        assert stream.error is None and not stream.is_alive(), f"{stream.error}\n{cluster.log.read_text()[-3000:]}"
    return [stream.texts for stream in streams]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("service", ["executor", "scheduler"])
def test_a_killed_process_is_a_pause(cluster: Cluster, paths: dict[str, Path], service: str) -> None:
    rows = soft_rows(load_oracle(paths["llama"]), IDS)
    expected = run_streams(cluster, rows, None)
    assert run_streams(cluster, rows, service) == expected
    cluster.wait_ready()
