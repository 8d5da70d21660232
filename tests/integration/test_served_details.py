"""Details of the REST protocol through real processes: what the gateway's own tests see at a scripted engine."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

import trivium
from cluster import Cluster, serve
from oracle import oracle
from tiny import save_tiny

pytestmark = pytest.mark.xdist_group("details")

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.name }}:{{ c.function.arguments.key }}){% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}{{ mood or '' }}"
)
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny("llama", tmp_path_factory.mktemp("details") / "chat", with_tokenizer=True)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    log = tmp_path_factory.mktemp("details") / "serve.log"
    flags = ("--num-threads", "1", "--scheduling-policy", "priority", "--max-num-seqs", "1", "--api-key", "secret")
    with serve(f"chat={model}", *flags, log=log) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url, api_key="secret", max_retries=0, timeout=60) as client:
        yield client


def call(cluster: Cluster, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=60)
    try:
        named = {"Authorization": "Bearer secret", "Content-Type": "application/json"} | headers
        connection.request(method, path, None if body is None else json.dumps(body), named)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), {k.lower(): v for k, v in response.getheaders()}
    finally:
        connection.close()


def test_tokenize_and_detokenize_are_the_tokenizers_own(cluster: Cluster, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    for text in ("Hello wörld", "a</s>b", ""):
        status, answer, _ = call(cluster, "POST", "/tokenize", {"model": "chat", "prompt": text})
        assert (status, answer["tokens"]) == (200, tokenizer(text)["input_ids"])
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 128)
        status, back, _ = call(cluster, "POST", "/detokenize", {"model": "chat", "tokens": answer["tokens"]})
        assert (status, back) == (200, {"prompt": text})
    status, skipped, _ = call(
        cluster, "POST", "/detokenize", {"tokens": tokenizer("a</s>b")["input_ids"], "skip_special_tokens": True}
    )
    assert (status, skipped) == (200, {"prompt": "ab"})


@pytest.mark.parametrize(
    ("fields", "rendered"),
    [
        ({}, "<user>hi<a>"),
        ({"tools": [TOOL]}, "[look_up]<user>hi<a>"),
        ({"tools": [TOOL], "chat_template_kwargs": {"mood": "!"}}, "[look_up]<user>hi<a>!"),
        ({"add_generation_prompt": False}, "<user>hi"),
    ],
)
def test_a_chat_is_tokenized_as_it_is_generated_from(
    cluster: Cluster, client: openai.OpenAI, model: Path, fields: dict[str, Any], rendered: str
) -> None:
    ids = AutoTokenizer.from_pretrained(model)(rendered)["input_ids"]
    body = {"model": "chat", "messages": HI} | fields
    assert call(cluster, "POST", "/tokenize", body)[1]["tokens"] == ids
    reply = client.chat.completions.create(
        model="chat", messages=HI, temperature=0, max_tokens=6, extra_body=fields | {"return_token_ids": True}
    )
    assert reply.prompt_token_ids == ids  # type: ignore[attr-defined]
    assert reply.choices[0].token_ids == oracle(model, ids, max_tokens=6)  # type: ignore[attr-defined]


def test_calls_and_their_results_are_part_of_the_conversation(cluster: Cluster, model: Path) -> None:
    call_made = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"key": "fox"}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call_made]},
        {"role": "tool", "content": "red", "tool_call_id": "1"},
    ]
    status, answer, _ = call(cluster, "POST", "/tokenize", {"messages": messages})
    expected = "<user>hi<assistant>(look_up:fox)<tool>red<a>"
    assert (status, answer["tokens"]) == (200, AutoTokenizer.from_pretrained(model)(expected)["input_ids"])


def test_a_streamed_completion_counts_and_shows_ids(client: openai.OpenAI, model: Path) -> None:
    ids = list(range(5, 15))
    *chunks, last = client.completions.create(
        model="chat",
        prompt=ids,
        temperature=0,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    shown: list[Any] = [chunk.choices[0] for chunk in chunks]
    assert shown[0].prompt_token_ids == ids
    generated = [token_id for choice in shown for token_id in choice.token_ids]
    assert len(generated) == 9 and generated[:5] == oracle(model, ids, max_tokens=9)[:5]
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert counts == sorted(counts) and counts[-1] == 9 and last.usage is not None
    assert last.usage.completion_tokens == 9 and last.usage.prompt_tokens == 10


def test_ids_of_requests_come_back(cluster: Cluster) -> None:
    body = {"model": "chat", "prompt": "a", "max_tokens": 1, "request_id": "job-7"}
    status, answer, headers = call(cluster, "POST", "/v1/completions", body, **{"X-Request-Id": "trace-1"})
    assert (status, answer["id"], headers["x-request-id"]) == (200, "cmpl-job-7", "trace-1")


def test_a_lower_priority_number_goes_first(client: openai.OpenAI) -> None:
    """One place in the batch: while the sixteen choices of one request have it, the others line up."""
    finished: list[str] = []

    def ask(name: str, priority: int) -> None:
        body: dict[str, Any] = {"priority": priority, "ignore_eos": True}
        client.completions.create(model="chat", prompt=name, max_tokens=100, extra_body=body)
        finished.append(name)

    stream = client.completions.create(
        model="chat", prompt="x", max_tokens=120, n=16, stream=True, extra_body={"priority": -9, "ignore_eos": True}
    )
    next(iter(stream))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = [pool.submit(ask, name, rank) for name, rank in (("last", 5), ("middle", 1), ("first", -5))]
        for job in jobs:
            job.result()
    assert finished == ["first", "middle", "last"]
    stream.close()


def test_without_the_policy_a_priority_is_refused(bundled: Cluster) -> None:
    with openai.OpenAI(base_url=bundled.url, api_key="none", max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as refused:
                client.completions.create(model="trivium-chat", prompt="a", stream=stream, extra_body={"priority": 1})
            assert refused.value.body["param"] == "priority"  # type: ignore[index]


def test_salted_and_cut_prompts_say_what_plain_ones_say(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "chat", "temperature": 0, "max_tokens": 8}
    plain = client.completions.create(prompt="quick brown fox", **settings)
    salted = client.completions.create(prompt="quick brown fox", user="me", extra_body={"cache_salt": "s"}, **settings)
    cut = client.completions.create(
        prompt="The " * 50 + "quick brown fox", extra_body={"truncate_prompt_tokens": 15}, **settings
    )
    assert plain.choices[0].text == salted.choices[0].text == cut.choices[0].text
    assert cut.usage is not None and cut.usage.prompt_tokens == 15


def test_usage_says_how_much_of_a_prompt_was_cached(client: openai.OpenAI) -> None:
    def cached(usage: Any) -> int:
        return usage.prompt_tokens_details.cached_tokens  # type: ignore[no-any-return]

    def block_end(num_tokens: int) -> int:
        return (num_tokens - 1) // 16 * 16  # the last token is computed each time

    settings: dict[str, Any] = {"model": "chat", "temperature": 0, "max_tokens": 3}
    messages: Any = [{"role": "user", "content": "never asked before, " * 4}]
    streamed: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    first, second = (client.chat.completions.create(messages=messages, n=2, **settings).usage for _ in range(2))
    assert first is not None and second is not None and second.prompt_tokens == first.prompt_tokens > 64
    assert (cached(first), cached(second)) == (0, block_end(first.prompt_tokens))
    *_, last = client.chat.completions.create(messages=messages, **settings, **streamed)
    assert cached(last.usage) == cached(second)

    prompts: Any = [list(range(40, 80)), list(range(100, 135))]
    assert [cached(client.completions.create(prompt=prompts, **settings).usage) for _ in range(2)] == [0, 64]
    *_, last = client.completions.create(prompt=prompts, n=2, **settings, **streamed)
    assert cached(last.usage) == 64
    salted = client.completions.create(prompt=prompts, extra_body={"cache_salt": "other"}, **settings)
    assert cached(salted.usage) == 0


def test_every_new_route_needs_the_key(cluster: Cluster) -> None:
    for method, path in (("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/version")):
        status, answer, _ = call(cluster, method, path, {} if method == "POST" else None, Authorization="Bearer no")
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert call(cluster, "GET", "/version")[:2] == (200, {"version": trivium.__version__})
