"""Every hostile request of the plan gets its exact answer, at once, and changes nothing of what others are told.

One cluster of a decoder-only and an encoder-decoder model, with a second gateway that has a key, a rate limit and is
strict. Eight well-formed requests run beside the rows all the time.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from cluster import Cluster, command, environment, free_port, serve
from hostile.client import WAIT_S, Answer, Canary, make_canaries, send
from hostile.embeds_rows import SENTINEL
from hostile.plan import DIFFERENT, ELSEWHERE, NUMBERS, ROWS
from hostile.row import (
    BART,
    COMPLETIONS,
    KEY,
    LLAMA,
    MAX_MODEL_LEN,
    NOBODY,
    Call,
    Door,
    Refusal,
    Row,
    completion,
    to,
)
from tiny import save_tiny

pytestmark = pytest.mark.xdist_group("hostile")

NUM_TABLES = int(os.environ.get("TRIVIUM_SOAK_TABLES", "1"))
REQUESTS_PER_MINUTE = 40
MAX_RSS_GROWTH_BYTES = 256 * 2**20  # of a gateway, from bodies of 64 MiB and what the allocator keeps of them
# What the model's template does depends on what a client says, as a broken one's would.
TEMPLATE = """
{%- set text = messages[0].content -%}
{%- macro itself() -%}{{ itself() }}{%- endmacro -%}
{%- if text == 'raise' -%}{{ raise_exception('no') }}
{%- elif text == 'undefined' -%}{{ nothing.at.all }}
{%- elif text == 'type' -%}{{ text + 1 }}
{%- elif text == 'recursion' -%}{{ itself() }}
{%- elif text == 'sandbox' -%}{{ ''.__class__.__mro__[1].__subclasses__() }}
{%- elif text == 'endless' -%}{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}
{%- endif -%}
{%- for message in messages -%}{{ message.role }}: {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt -%}assistant: {%- endif -%}
"""


@dataclass
class World:
    """What the rows meet, and what was measured."""

    cluster: Cluster
    locked_port: int
    locked: subprocess.Popen[bytes]
    canaries: list[Canary]
    pids: dict[str, int]
    gateway_bytes: int  # resident memory before the first row
    seconds: dict[str, float] = field(default_factory=dict)  # row -> of its answer

    def port(self, door: Door) -> int:
        return self.cluster.port if door is Door.OPEN else self.locked_port

    def ask(self, row: Row) -> Answer:
        closes = isinstance(row.answer, Refusal) and row.answer.closes
        began_s = time.monotonic()
        answer = send(self.port(row.door), row.sent, closes=closes)
        self.seconds[row.name] = time.monotonic() - began_s
        return answer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hostile")
    llama = save_tiny(LLAMA, folder / LLAMA, with_tokenizer=True, max_position_embeddings=MAX_MODEL_LEN)
    (llama / "chat_template.jinja").write_text(TEMPLATE)
    bart = save_tiny(BART, folder / BART, with_tokenizer=True)
    flags = ("--enable-prompt-embeds", "--kv-cache-memory", "1MiB", "--max-waiting-requests", "100")
    with serve(f"{LLAMA}={llama}", f"{BART}={bart}", *flags, log=folder / "serve.log") as cluster:
        with locked_gateway(cluster, folder / "locked.log") as (port, process):
            canaries = make_canaries(cluster.url)
            pids = {name: child.pid for name, child in cluster.children().items()}
            send(cluster.port, completion(guided_regex="a"))  # the executor reads its vocabulary with the first grammar
            gateway_bytes = psutil.Process(pids["gateway"]).memory_info().rss
            world = World(cluster, port, process, canaries, pids, gateway_bytes)
            for canary in canaries:
                canary.start()
            yield world
            for canary in canaries:
                canary.stop()
        slowest = sorted(world.seconds.items(), key=lambda item: -item[1])[:10]
        print("\nslowest rows:", *(f"  {seconds:.2f} s  {name}" for name, seconds in slowest), sep="\n")


@contextmanager
def locked_gateway(cluster: Cluster, log: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A second gateway to the first model of `cluster`, and to a model that nobody runs."""
    argv = cluster.children()["gateway"].cmdline()
    scheduler = next(text for text in argv if text.startswith(f"{LLAMA}="))
    tokenizer = argv[argv.index("--tokenizer") + 1]
    port = free_port()
    args = ("--model", scheduler, "--model", f"{NOBODY}=unix:{log.parent}/nobody", "--tokenizer", tokenizer)
    args += ("--port", str(port), "--strict", "--max-requests-per-minute", str(REQUESTS_PER_MINUTE))
    args += ("--drain-timeout", str(WAIT_S))
    with log.open("w") as stream:
        env = environment(TRIVIUM_API_KEY=KEY)
        process = subprocess.Popen(command("gateway", *args), stdout=stream, stderr=subprocess.STDOUT, env=env)
    try:
        deadline = time.monotonic() + WAIT_S
        while waiting_for(port) != [NOBODY]:
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield port, process
    finally:
        process.kill()
        process.wait()


def waiting_for(port: int) -> list[str] | None:
    """What the gateway at `port` says it waits for; None if it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5) as answer:
            return [] if answer.status == 200 else None
    except urllib.error.HTTPError as error:
        names: list[str] = json.load(error)["waiting_for"]
        return names
    except OSError:
        return None


def locked(**fields: object) -> Call:
    """A completion by the key of the locked gateway."""
    body = {"model": LLAMA, "prompt": "a", "max_tokens": 2, **fields}
    return to(COMPLETIONS, body, Authorization=f"Bearer {KEY}")


def test_every_number_of_the_plan_is_accounted_for() -> None:
    numbers = {row.number for row in ROWS}
    assert numbers | ELSEWHERE.keys() == set(NUMBERS)
    assert not numbers & ELSEWHERE.keys() and DIFFERENT.keys() <= set(NUMBERS)
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS * NUM_TABLES, ids=lambda row: row.name)
def test_row(world: World, row: Row) -> None:
    answer = world.ask(row)
    if isinstance(row.answer, Refusal):
        expected = row.answer
        assert answer.error() == (expected.status, expected.code, expected.param), answer.body[:500]
        assert set(expected.headers) <= answer.headers.keys()
    else:
        assert answer.status == row.answer.status, answer.body[:500]
        assert row.answer.holds(answer.json), answer.body[:500]
    assert world.seconds[row.name] < row.max_s


def test_pipelined_requests_are_answered_in_order(world: World) -> None:
    """B76"""
    bodies = [json.dumps({"model": LLAMA, "prompt": text, "max_tokens": 8, "echo": True}) for text in ("one", "two")]
    streamed = json.dumps({"model": LLAMA, "prompt": "three", "max_tokens": 20, "stream": True, "ignore_eos": True})
    data = b"".join(
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        for body in (streamed, *bodies)
    )
    with socket.create_connection(("127.0.0.1", world.cluster.port), timeout=WAIT_S) as connection:
        connection.sendall(data + b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = b"".join(iter(lambda: connection.recv(65536), b"")).split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert len(answers) == 4
    assert answers[0].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and b"one" not in answers[0]
    assert b'"text":"one' in answers[1] and b'"text":"two' in answers[2] and b'"version"' in answers[3]


def test_a_model_without_an_engine_is_503(world: World) -> None:
    """B78"""
    answer = send(world.locked_port, locked(model=NOBODY))
    assert answer.error() == (503, "model_loading", None) and int(answer.headers["retry-after"]) >= 1


def test_an_idempotency_key_stands_for_one_request(world: World) -> None:
    """B80"""
    bodies = [{"model": LLAMA, "prompt": prompt, "max_tokens": 4, "seed": 1} for prompt in ("a", "a", "b")]
    answers = [send(world.cluster.port, to(COMPLETIONS, body, Idempotency_Key="k")) for body in bodies]
    assert answers[0].json["choices"] == answers[1].json["choices"]
    assert answers[2].error() == (400, "idempotency_mismatch", "Idempotency-Key")


def test_a_caller_that_sends_too_much_is_told_when_to_come_back(world: World) -> None:
    """B79"""
    answers = [send(world.locked_port, locked())]
    while answers[-1].status == 200:  # the bucket refills meanwhile, which a busy machine gives it time for
        assert len(answers) < 3 * REQUESTS_PER_MINUTE
        answers.append(send(world.locked_port, locked()))
    assert answers[-1].error() == (429, "rate_limit_exceeded", None)
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert {answer.status for answer in answers} == {200, 429}


def test_a_gateway_that_drains_refuses_and_ends_in_order(world: World) -> None:
    """B78"""
    time.sleep(math.ceil(60 / REQUESTS_PER_MINUTE))  # until the bucket holds a request again
    stream = locked(max_tokens=500, n=4, temperature=1, ignore_eos=True, stream=True)
    assert stream.body is not None
    get = Call("/v1/models", None, (("Authorization", f"Bearer {KEY}"),), "GET")
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Length: {len(stream.body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", world.locked_port), timeout=WAIT_S) as connection:
        connection.sendall(head.encode() + stream.body)
        received = connection.recv(65536)
        world.locked.terminate()
        while (answer := send(world.locked_port, get)).status == 200:
            pass
        assert answer.error() == (503, "draining", None)
        assert int(answer.headers["retry-after"]) >= 1 and answer.is_closed
        received += b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert world.locked.wait(WAIT_S) == 0


def test_the_requests_beside_the_rows_always_said_the_same(world: World) -> None:
    for canary in world.canaries:
        canary.stop()
        assert canary.error is None and not canary.is_alive(), canary.error
        assert len(canary.texts) == 1 and canary.num_runs > 1, (canary.name, canary.texts)


def test_a_full_queue_is_429_at_once(world: World) -> None:
    """B78. After the others have ended: it is full for everybody."""
    answer = send(world.cluster.port, completion(prompt=["a"] * 64, n=16, temperature=1, max_tokens=400))
    assert answer.error() == (429, "queue_full", None) and int(answer.headers["retry-after"]) >= 1


def test_nothing_is_left_at_the_end(world: World) -> None:
    assert {name: process.pid for name, process in world.cluster.children().items()} == world.pids
    assert not SENTINEL.exists()
    for log in (world.cluster.log, world.cluster.log.with_name("locked.log")):
        text = log.read_text()
        assert not re.search(r"^\S+ \S+ (ERROR|CRITICAL) |Traceback", text, re.MULTILINE), text[-3000:]
    world.cluster.assert_nothing_held()
    growth = psutil.Process(world.pids["gateway"]).memory_info().rss - world.gateway_bytes
    assert growth < MAX_RSS_GROWTH_BYTES, f"{growth / 2**20:.0f} MiB"
