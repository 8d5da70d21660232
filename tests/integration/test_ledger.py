"""After a burst with clients that leave and a tokenizer that dies, the ledgers of real processes are back at zero."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import Cluster, serve
from tiny import save_tiny

pytestmark = pytest.mark.xdist_group("recovery")

SERVICES = ("gateway", "scheduler", "executor", "tokenizer")
NUM_CALLS = 12
MAX_TOKENS = 600  # about a second of decoding, so that the kill finds the streams in the middle
SETTLE_S = 20
SLACK = {"open_file_descriptors": 1, "asyncio_tasks": 1, "threads": 4}  # a pool grows on demand

Samples = dict[tuple[str, str, str], float]  # (metric, service, model) -> value


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("ledger")
    checkpoint = save_tiny("llama", folder / "llama", with_tokenizer=True, max_position_embeddings=1024)
    with serve(f"llama={checkpoint}", log=folder / "serve.log") as cluster:
        yield cluster


def scrape(cluster: Cluster) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, sample.labels["service"], sample.labels["model"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "service" in sample.labels
    }


class Call(threading.Thread):
    """One API call of one of four kinds: streamed to the end, left after its first text, stopped by text, whole."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        super().__init__(daemon=True)
        self.client = openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0)
        self.number = number
        self.first = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self.error = error
        finally:
            self.first.set()
            self.client.close()

    def _call(self) -> None:
        kind = self.number % 4
        arguments = {
            "model": "llama", "prompt": "some words that are shared " * 4 + "x" * self.number, "seed": self.number,
            "max_tokens": MAX_TOKENS, "n": 1 + self.number % 2, "extra_body": {"ignore_eos": True},
            **({"stop": ["a", "e", "t"]} if kind == 2 else {}),
        }  # fmt: skip
        if kind == 3:
            self.client.completions.create(**arguments)  # type: ignore[call-overload]
            return
        chunks = self.client.completions.create(**arguments, stream=True)  # type: ignore[call-overload]
        for _ in chunks:
            self.first.set()
            if kind == 1:
                time.sleep(0.1)
                chunks.close()
                return


def run_burst(cluster: Cluster, *, killed: str | None) -> None:
    calls = [Call(cluster, number) for number in range(NUM_CALLS)]
    for call in calls:
        call.start()
    for call in calls:
        if call.number % 4 == 0:
            assert call.first.wait(60)
    if killed is not None:
        assert held(scrape(cluster))["requests_running"] > 0, "the kill comes too late to test anything"
        cluster.kill(killed)
    for call in calls:
        call.join(90)
        assert call.error is None and not call.is_alive(), f"{call.error}\n{cluster.log.read_text()[-3000:]}"


def held(samples: Samples) -> dict[str, float]:
    """What must be nothing when nothing runs. KeyError if a service did not answer."""
    scheduler = {
        name: samples[f"trivium_scheduler_{name}", "scheduler", "llama"]
        for name in ("requests_running", "requests_waiting", "tokens_waiting", "blocks_held", "blocks_cross")
    }
    return scheduler | {"handles": samples["trivium_tokenizer_detokenize_handles", "tokenizer", ""]}


def level(samples: Samples) -> dict[tuple[str, str], float]:
    return {
        (service, name): samples[f"trivium_{name}", service, "llama" if service in ("scheduler", "executor") else ""]
        for service in SERVICES
        for name in SLACK
    }


def is_at_rest(samples: Samples, expected: dict[tuple[str, str], float] | None) -> bool:
    try:
        if any(held(samples).values()):
            return False
        now = level(samples)
    except KeyError:  # a service has not come back yet
        return False
    return expected is None or all(now[key] <= expected[key] + SLACK[key[1]] for key in now)


def settled(cluster: Cluster, expected: dict[tuple[str, str], float] | None = None) -> Samples:
    """The numbers once everything is given back, and no process holds more than `expected`."""
    deadline = time.monotonic() + SETTLE_S
    while not is_at_rest(samples := scrape(cluster), expected):
        assert time.monotonic() < deadline, f"{held(samples)}\n{expected}\n{level(samples)}\n{samples}"
        time.sleep(0.1)
    return samples


def test_nothing_is_held_after_a_burst_with_left_streams_and_a_killed_tokenizer(cluster: Cluster) -> None:
    run_burst(cluster, killed=None)  # what is made once on demand, threads and connections, is there from now on
    settled(cluster)
    time.sleep(1)  # the server's ends of the clients' connections are gone, too
    before = settled(cluster)
    run_burst(cluster, killed="tokenizer")
    after = settled(cluster, level(before))
    assert all(after["trivium_up", service, "llama" if service in ("scheduler", "executor") else ""] == 1
               for service in SERVICES)  # fmt: skip
    assert set(held(after).values()) == {0}
    blocks = {name: after[f"trivium_scheduler_{name}", "scheduler", "llama"] for name in ("blocks", "blocks_free")}
    assert blocks["blocks"] == blocks["blocks_free"] > 0
    assert after["trivium_scheduler_sessions", "scheduler", "llama"] == 1
    assert after["trivium_uptime_seconds", "tokenizer", ""] < after["trivium_uptime_seconds", "scheduler", "llama"] - 1
    steps = "trivium_executor_steps_total", "executor", "llama"
    assert after[steps] > before[steps] > MAX_TOKENS
