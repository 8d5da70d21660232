"""Log-probabilities, echo and best_of through the four processes, against transformers, and through kills."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import torch
from transformers import AutoTokenizer

from cluster import Cluster, serve
from tiny import load_oracle, save_tiny
from trivium import wire
from trivium.v1 import scheduler_pb2, scheduler_pb2_grpc, types_pb2

pytestmark = pytest.mark.xdist_group("served")

TEXT = "Größe: 日本 \U0001f600"  # characters of one to four bytes: of the byte tokenizer, one to four tokens
MAX_TOKENS = 1000


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("logprobs")
    return {
        "llama": save_tiny("llama", folder / "llama", with_tokenizer=True, max_position_embeddings=2048),
        "bart": save_tiny("bart", folder / "bart", with_tokenizer=True),
    }


@pytest.fixture(scope="module")
def cluster(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    log = tmp_path_factory.mktemp("logprobs_served") / "serve.log"
    models = [f"{name}={path}" for name, path in paths.items()]
    with serve(*models, "--num-threads", "1", "--max-num-batched-tokens", "16", log=log) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as client:
        yield client


def expected(path: Path, ids: list[int], encoder: list[int] | None = None) -> torch.Tensor:
    """[len(ids) - 1, vocab_size]: row i is of the token at position i + 1."""
    model = load_oracle(path)
    with torch.inference_mode():
        if encoder is None:
            logits = model(input_ids=torch.tensor([ids])).logits
        else:
            logits = model(input_ids=torch.tensor([encoder]), decoder_input_ids=torch.tensor([ids])).logits
    return torch.log_softmax(logits[0].double(), dim=-1)[:-1]


def of_tokens(table: torch.Tensor, ids: list[int]) -> list[float]:
    return [row[token_id].item() for row, token_id in zip(table, ids, strict=True)]


def merged(chunks: Any) -> tuple[str, dict[str, list[Any]]]:
    text, columns = "", {}
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.text
        for name, column in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
            columns.setdefault(name, []).extend(column)
    return text, columns


def raw_of(tokens: list[str]) -> bytes:
    """The bytes of a `tokens` column."""
    return b"".join(
        bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        for token in tokens
    )


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_and_its_output(client: openai.OpenAI, paths: dict[str, Path], stream: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(paths["llama"])
    prompt = tokenizer(TEXT)["input_ids"]
    response = client.completions.create(
        model="llama",
        prompt=TEXT,
        echo=True,
        logprobs=3,
        max_tokens=20,
        temperature=1,
        seed=3,
        stream=stream,
        extra_body={"skip_special_tokens": False},
    )
    if stream:
        text, columns = merged(response)
    else:
        text, columns = response.choices[0].text, response.choices[0].logprobs.model_dump()
    raw = raw_of(columns["tokens"])
    assert raw.startswith(TEXT.encode()) and raw.decode(errors="replace") == text
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(TEXT))
    assert ids == prompt
    output = ids_of(tokenizer, columns["tokens"][len(prompt) :])
    table = expected(paths["llama"], prompt + output)
    assert columns["token_logprobs"][0] is None and columns["top_logprobs"][0] is None
    assert columns["token_logprobs"][1:] == pytest.approx(of_tokens(table, (prompt + output)[1:]), abs=1e-4)
    for top, row in zip(columns["top_logprobs"][1:], table, strict=True):
        assert sorted(top.values())[-3:] == pytest.approx(row.topk(3).values.tolist()[::-1], abs=1e-4)
    offsets = columns["text_offset"]
    assert offsets[len(prompt)] == len(TEXT) and offsets == sorted(offsets)
    assert offsets[:4] == [0, 1, 2, 2]  # G, r, and the two halves of the third character


def ids_of(tokenizer: Any, names: list[str]) -> list[int]:
    """Token ids of the byte tokenizer's tokens by their names."""
    names_of = {}
    for token_id in range(len(tokenizer)):
        piece = tokenizer.convert_ids_to_tokens(token_id)
        byte = tokenizer.backend_tokenizer.decoder.decode([piece])
        names_of[piece if token_id < 4 else byte] = token_id
    by_byte = {bytes_of(tokenizer, token_id): token_id for token_id in range(4, len(tokenizer))}
    return [names_of[name] if name in ("<pad>", "<s>", "</s>", "<unk>") else by_byte[raw_of([name])] for name in names]


def bytes_of(tokenizer: Any, token_id: int) -> bytes:
    """The byte of a byte token, from the position of its character in the byte alphabet."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    piece = tokenizer.convert_ids_to_tokens(token_id)
    return bytes([next(byte for byte, char in bytes_to_unicode().items() if char == piece)])


def test_chat_bytes_join_to_the_text_and_the_model_is_told_apart_from_its_filters(
    client: openai.OpenAI, paths: dict[str, Path]
) -> None:
    """BART: the last user message is the encoder input; forced tokens have the model's own number."""
    tokenizer = AutoTokenizer.from_pretrained(paths["bart"])
    for stream in (False, True):
        response = client.chat.completions.create(
            model="bart",
            messages=[{"role": "user", "content": TEXT}],
            logprobs=True,
            top_logprobs=4,
            temperature=0.5,
            seed=9,
            max_tokens=12,
            stream=stream,
            extra_body={"repetition_penalty": 1.7},
        )
        if stream:
            choices = [choice for chunk in response for choice in chunk.choices]
            text = "".join(choice.delta.content or "" for choice in choices)
            content = [item for choice in choices if choice.logprobs for item in choice.logprobs.content]
        else:
            text, content = response.choices[0].message.content, response.choices[0].logprobs.content
        specials = {"<s>", "</s>", "<pad>", "<unk>"}
        raw = b"".join(bytes(item.bytes) for item in content if item.token not in specials)
        assert raw.decode(errors="replace") == text
        names = [item.token if item.token in specials else name_of(bytes(item.bytes)) for item in content]
        ids = ids_of(tokenizer, names)
        table = expected(paths["bart"], [2, *ids], tokenizer(TEXT)["input_ids"])
        assert [item.logprob for item in content] == pytest.approx(of_tokens(table, ids), abs=1e-4)
        assert content[0].token == "<s>" and len(content[0].top_logprobs) == 4
        for item, row in zip(content, table, strict=True):
            tops = [top.logprob for top in item.top_logprobs]
            assert tops == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def name_of(raw: bytes) -> str:
    return raw.decode() if raw.isascii() else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def test_generate_carries_logprobs(cluster: Cluster, paths: dict[str, Path]) -> None:
    scheduler = next(
        process for name, process in cluster.children().items() if "scheduler" in name and "llama" in process.cmdline()
    )
    address = scheduler.cmdline()[scheduler.cmdline().index("--listen") + 1]
    prompt = list(range(20, 60))
    request = scheduler_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(single=types_pb2.SingletonPrompt(tokens=types_pb2.TokensPrompt(ids=prompt))),
        sampling=types_pb2.SamplingParams(n=2, seed=4, max_tokens=8, logprobs=1, prompt_logprobs=0, ignore_eos=True),
        stream=True,
    )
    outputs: dict[int, list[int]] = {0: [], 1: []}
    logprobs: dict[int, list[float]] = {0: [], 1: []}
    of_prompt: list[float] = []
    with grpc.insecure_channel(address) as channel:
        for response in scheduler_pb2_grpc.SchedulerStub(channel).Generate(request, timeout=30):
            if response.HasField("delta"):
                delta = wire.delta_from_proto(response.delta)
                outputs[delta.index] += delta.token_ids
                logprobs[delta.index] += [value.logprob for value in delta.logprobs]
                of_prompt += [value.logprob for value in delta.prompt_logprobs]
    for index in (0, 1):
        table = expected(paths["llama"], prompt + outputs[index])
        assert len(outputs[index]) == 8
        assert of_prompt + logprobs[index] == pytest.approx(of_tokens(table, (prompt + outputs[index])[1:]), abs=1e-4)


def test_best_of_returns_the_likeliest_of_the_same_choices(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "llama", "prompt": "abc", "max_tokens": 10, "seed": 6, "temperature": 1}
    every = client.completions.create(n=5, logprobs=0, **asked)
    best = client.completions.create(n=2, best_of=5, logprobs=0, **asked)

    def score(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(every.choices, key=score, reverse=True)
    assert len({choice.text for choice in every.choices}) == 5
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert [score(choice) for choice in best.choices] == pytest.approx([score(choice) for choice in ranked[:2]])
    plain = client.completions.create(n=1, best_of=5, **asked)
    assert plain.choices[0].text == ranked[0].text and plain.choices[0].logprobs is None


class Call(threading.Thread):
    """One completion with everything that has to arrive once. `first` is set with the first news of a streamed one."""

    def __init__(self, cluster: Cluster, *, stream: bool, **fields: Any) -> None:
        super().__init__(daemon=True)
        self.client = openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0)
        self.stream = stream
        self.fields = fields
        self.first = threading.Event()
        self.text = ""
        self.columns: dict[str, list[Any]] = {}
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            response = self.client.completions.create(
                model="llama",
                prompt="a prompt of some length, " * 8,
                seed=7,
                stream=self.stream,
                extra_body={"ignore_eos": True},
                **self.fields,
            )
            if self.stream:
                self.text, self.columns = merged(self._noted(response))
            else:
                choice = response.choices[0]
                self.text, self.columns = choice.text, choice.logprobs.model_dump()
        except Exception as error:
            self.error = error
        finally:
            self.first.set()
            self.client.close()

    def _noted(self, chunks: Any) -> Iterator[Any]:
        for chunk in chunks:
            self.first.set()
            yield chunk


def is_of(process: Any, service: str, model: str) -> bool:
    argv = process.cmdline()
    return service in argv and any(argument.split("/")[-1] == model for argument in argv)


def numbers(call: Call) -> list[float]:
    """All its log-probabilities but the missing one of an echoed prompt's first token."""
    column = call.columns["token_logprobs"]
    return [number for number in column if number is not None]


def run_calls(cluster: Cluster, service: str | None) -> list[Call]:
    """Streamed and whole calls, with one process killed once every streamed one has begun."""
    calls = [
        Call(cluster, stream=True, echo=True, logprobs=2, temperature=1, max_tokens=MAX_TOKENS),
        Call(cluster, stream=True, logprobs=0, temperature=0, max_tokens=MAX_TOKENS),
        Call(cluster, stream=False, echo=True, logprobs=1, temperature=1, max_tokens=MAX_TOKENS),
        Call(cluster, stream=False, best_of=3, echo=True, logprobs=1, temperature=1, max_tokens=300),
    ]
    for call in calls:
        call.start()
    for call in calls:
        if call.stream:
            assert call.first.wait(60)
    if service is not None:
        name = next(name for name, process in cluster.children().items() if is_of(process, service, "llama"))
        assert all(call.is_alive() for call in calls), "the kill comes too late"
        cluster.kill(name)
    for call in calls:
        call.join(90)
        assert call.error is None and not call.is_alive(), f"{call.error}\n{cluster.log.read_text()[-3000:]}"
    return calls


@pytest.mark.parametrize("service", ["scheduler", "executor", "tokenizer"])
def test_a_kill_loses_and_repeats_no_logprob(cluster: Cluster, service: str) -> None:
    undisturbed, disturbed = run_calls(cluster, None), run_calls(cluster, service)
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.text == before.text
        assert after.columns["tokens"] == before.columns["tokens"]
        assert after.columns["text_offset"] == before.columns["text_offset"]
        assert numbers(after) == pytest.approx(numbers(before), abs=1e-4)
    cluster.wait_ready()
